"Every link of README.md and of all notebooks leads somewhere: files exist, and anchors are headings."
import json, re
from pathlib import Path
from urllib.parse import unquote
import pytest

root = Path(__file__).parent.parent
home = 'https://github.com/fasterprune/fasterprune/blob/main/'
link = re.compile(r'\]\(([^)\s]+)\)')
notebooks = sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
pages = [root/'README.md', root/'CHANGELOG.md', root/'CONTRIBUTING.md', root/'nbs/llms.txt', *notebooks]

def markdown(path):
    "The text of a page: Markdown cells, or the whole file; without code, in which brackets are no links"
    if path.suffix != '.ipynb': return re.sub(r'```.*?```|`[^`\n]+`', '', path.read_text(), flags=re.S)
    cells = json.loads(path.read_text())['cells']
    text = '\n\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.sub(r'```.*?```|`[^`\n]+`', '', text, flags=re.S)

def headings(path):
    "Anchors of a page, as GitHub, Jupyter and mkdocs make them"
    if path.suffix != '.ipynb': text = path.read_text()
    else: text = '\n\n'.join(''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == 'markdown')
    titles = re.findall(r'^#+ +(.+?)\s*$', text, re.M)
    slugs = {re.sub(r'[^\w\- ]', '', t).strip().lower().replace(' ', '-') for t in titles}
    return slugs | {re.sub(r'-+', '-', s) for s in slugs} | {t.replace('`', '').replace(' ', '-') for t in titles}

def target(page, url):
    "File and anchor that a link means; None for other sites"
    if url.startswith(home): base,url = root,url.removeprefix(home).removesuffix('?raw=true')
    elif re.match(r'[a-z]+:', url): return None
    else: base = page.parent
    name,_,anchor = unquote(url).partition('#')
    return (base/name if name else page), anchor

def broken(page):
    found = [(url, target(page, url)) for url in link.findall(markdown(page))]
    for url,to in found:
        if to is None: continue
        file,anchor = to
        if not file.exists() or anchor and anchor not in headings(file): yield url

@pytest.mark.parametrize('page', pages, ids=lambda p: str(p.relative_to(root)))
def test_no_link_is_broken(page): assert list(broken(page)) == []

def test_links_of_the_readme_are_absolute():
    assert [u for u in link.findall(markdown(root/'README.md')) if not u.startswith('https://')] == []

def test_every_page_is_linked_from_the_site():
    "Tutorials are on the first page and in the menu; rooms are in the menu"
    menu,first = (root/'mkdocs.yml').read_text(),markdown(root/'nbs/index.ipynb')
    names = [str(p.relative_to(root/'nbs')) for p in notebooks]
    assert [n for n in names if n.replace('.ipynb', '.md') not in menu] == []
    assert [n for n in names if n.startswith('tutorials/') and n not in first] == []
