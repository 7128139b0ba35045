"README.md is nbs/index.ipynb as Markdown: run this file after running the notebook."
import sys
from pathlib import Path
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).parent.parent

def readme() -> str:
    "The index notebook, without its hidden cells."
    c = Config()
    c.RegexRemovePreprocessor.patterns = [r'#\| *(hide|default_exp)']
    c.MarkdownExporter.preprocessors = ['nbconvert.preprocessors.RegexRemovePreprocessor']
    return MarkdownExporter(config=c).from_filename(str(root/'nbs/index.ipynb'))[0].strip() + '\n'

if __name__ == '__main__': (root/'README.md').write_text(readme())
