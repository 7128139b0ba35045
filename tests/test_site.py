"The site, built and read as a visitor's browser reads it: every link and anchor is followed, every public name has its parameters."
import importlib, inspect, json, os, re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote
import pytest
from fastcore.docments import docments
import make_docs

class Page(HTMLParser):
    "Links, anchors, pictures and text of a page"
    def __init__(self, path):
        super().__init__()
        self.links,self.ids,self.alts,self.text = [],set(),[],[]
        self.feed(path.read_text())
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]
        self.ids.add(attrs.get('id'))
        if tag == 'img': self.alts.append(attrs.get('alt'))
    def handle_data(self, data): self.text.append(data)

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    to = tmp_path_factory.mktemp('site')
    make_docs.make_site(to)
    return SimpleNamespace(root=to, pages={p: Page(p) for p in sorted(to.rglob('index.html'))})

address = re.search(r'^site_url: (\S+)', (make_docs.root/'mkdocs.yml').read_text(), re.M)[1]

def leads_to(page, url, top):
    "File and anchor in the site or in the repository; None for other sites"
    url,_,anchor = unquote(url).partition('#')
    if url.startswith(address): page,url = top/'index.html',url.removeprefix(address) or '.'
    if url.startswith(make_docs.home): return make_docs.root/url.removeprefix(make_docs.home+'/').removesuffix('?raw=true'), ''
    if re.match(r'[a-z]+:', url): return None
    to = Path(os.path.normpath(page.parent/url)) if url else page
    return to/'index.html' if to.is_dir() else to, anchor

def test_every_link_and_anchor_of_the_site_leads_somewhere(site):
    followed = [(page, url, leads_to(page, url, site.root)) for page,p in site.pages.items() for url in p.links]
    inside = [(page, url, *to) for page,url,to in followed if to is not None]
    assert [(page, url) for page,url,file,_ in inside if not file.exists()] == []
    anchors = [(page, url, file, a) for page,url,file,a in inside if a and file in site.pages and not a.startswith('__')]
    assert [(page, url) for page,url,file,a in anchors if a not in site.pages[file].ids] == []
    assert len(inside) > 5000 and len(anchors) > 1000
    print(f'followed {len(inside)} links and {len(anchors)} anchors of {len(site.pages)} pages')

def test_links_to_the_site_lead_there(site):
    "From the README, from what machines read, and from errors"
    texts = [p.read_text() for p in (make_docs.root/'README.md', make_docs.root/'nbs/llms.txt', *(make_docs.root/'fasterprune').glob('*.py'))]
    urls = {u for t in texts for u in re.findall(re.escape(address)+r"[^\s)'\"}]*", t)}
    assert len(urls) > 2 and [u for u in urls if not leads_to(site.root/'index.html', u, site.root)[0].exists()] == []

def test_every_picture_says_what_it_shows(site):
    alts = [(page, a) for page,p in site.pages.items() for a in p.alts]
    assert len(alts) > 40 and [page for page,a in alts if not a or len(a) < 4] == []

def public(path):
    "Functions and classes that a notebook's module makes public, without second names"
    cells = json.loads(path.read_text())['cells']
    module = make_docs.module_of(cells)
    for name in module.__all__ if module else ():
        o = getattr(module, name)
        if (inspect.isfunction(o) or inspect.isclass(o)) and (o.__module__, o.__name__) == (module.__name__, name): yield name, o

def test_every_public_name_has_its_parameters_on_its_page(site):
    count = 0
    for path in make_docs.notebooks():
        where = site.root/path.relative_to(make_docs.root/'nbs').with_suffix('')/'index.html'
        for name,o in public(path):
            text = re.sub(r'\s+', ' ', ' '.join(site.pages[where].text))
            assert name in site.pages[where].ids, f'{path.name}: no entry for {name}'
            for arg,comment in docments(o).items():
                plain = re.sub(r'[`*\\]|\s+', ' ', comment or '').split()
                assert arg in ('return', 'self') or arg in text
                assert all(word in text for word in plain), f'{path.name}: {name}({arg}) {comment}'
            count += 1
    assert count > 250

def test_no_flag_and_no_unfolded_export_is_shown(site):
    for page,p in site.pages.items():
        assert not re.search(r'^#\| *\w', ''.join(p.text), re.M), page

def test_the_search_finds_a_name(site):
    entries = json.loads((site.root/'search/search_index.json').read_text())['docs']
    assert any(e['location'] == '10_callback/#SparsifyCallback' for e in entries)

def test_programs_find_the_api(site):
    text = (site.root/'apilist.txt').read_text()
    assert '- `SparsifyCallback(sparsity, ' in text and 'apilist.txt' in (site.root/'llms.txt').read_text()
