"README.md is nbs/index.ipynb as Markdown: run this file after running the notebook."
import re
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parent.parent
home = 'https://github.com/fasterprune/fasterprune/blob/main'

def absolute(
    text:str, # Markdown of the index
) -> str: # The same, with links that work on a package index as well
    text = re.sub(r'\]\((images/[^)\s]+)\)', rf']({home}/nbs/\1?raw=true)', text)
    return re.sub(r'\]\((?=\d\d\w?_|tutorials/|experiments/)', f']({home}/nbs/', text)

def readme() -> str:
    "The index notebook without its hidden cells, with absolute links."
    c = Config()
    c.RegexRemovePreprocessor.patterns = [r'#\| *(hide|default_exp)']
    c.MarkdownExporter.preprocessors = ['nbconvert.preprocessors.RegexRemovePreprocessor']
    nb = nbformat.read(root/'nbs/index.ipynb', as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    text = MarkdownExporter(config=c).from_notebook_node(nb)[0]
    text = re.sub(r'<style>.*?</style>', '', text, flags=re.S)
    text = re.sub(r'^ +$', '', absolute(text), flags=re.M)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme())
