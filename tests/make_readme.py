"README.md is nbs/index.ipynb as Markdown: run this file after running the notebook."
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parent.parent

def readme() -> str:
    "The index notebook without its hidden cells, with links that work from the root."
    c = Config()
    c.RegexRemovePreprocessor.patterns = [r'#\| *(hide|default_exp)']
    c.MarkdownExporter.preprocessors = ['nbconvert.preprocessors.RegexRemovePreprocessor']
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    text = MarkdownExporter(config=c).from_notebook_node(nb)[0]
    text = re.sub(r'<style>.*?</style>', '', text, flags=re.S)
    text = re.sub(r'\]\((images/|\d\d_|tutorials/)', r'](nbs/\1', text)
    return re.sub(r'\n\s*\n', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme())
