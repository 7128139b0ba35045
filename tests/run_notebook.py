"Run notebooks in Jupyter and keep their outputs: python tests/run_notebook.py nbs/*.ipynb. Cells that need a GPU or a long time are left out."
import re, sys
from pathlib import Path
import nbformat
from nbclient import NotebookClient

class Client(NotebookClient):
    async def async_execute_cell(self, cell, cell_index, **kwargs):
        if re.search(r'^#\| *(cuda|slow)', cell.source, re.M): return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)

for name in sys.argv[1:]:
    nb = nbformat.read(name, as_version=4)
    Client(nb, timeout=600, kernel_name='python3', resources=dict(metadata=dict(path=str(Path(name).parent)))).execute()
    nbformat.write(nb, name)
