"""Execute ``docs/notebooks/cartpole.ipynb``, and write what comes out into it.

    python scripts/run_notebook.py             # with the numbers that stand in it: some minutes
    python scripts/run_notebook.py --small     # with small numbers; writes nothing, only says whether it runs

Where a cell raises, its traceback is shown, the exit status is 1, and the file stays as it is. Needs nbclient and
ipykernel, besides what the notebook imports.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebooks" / "cartpole.ipynb"
PARAMETERS = "parameters"  # tag of the cell with the numbers

#: Numbers with which it still learns, in half a minute or so.
SMALL = {
    "N_STEPS": 16,
    "N_ENVS": 8,
    "N_ACTORS": 2,
    "N_BUFFERS": 4,
    "N_TRIED": 3,
    "N_EPOCHS": 6,
    "N_BATCHES": 100,
    "N_EPISODES": 20,
}

#: A folder of some machine, and whatever follows.
PATH = re.compile(r"(?<![\w.~/])/(?:home|root|tmp|Users|work|usr|opt|var|mnt)/[^\s'\",:;)\]]*")


def replace_numbers(notebook: nbformat.NotebookNode, numbers: Mapping[str, int]) -> None:
    """Give names of the cell with the numbers other values.

    Raises:
        ValueError: there is not one such cell, or it does not assign one of the names.
    """
    tagged = [cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f"expected one cell tagged {PARAMETERS!r}, found {len(tagged)}")
    names = {node.id for node in ast.walk(ast.parse(tagged[0].source)) if isinstance(node, ast.Name)}
    if unknown := numbers.keys() - names:
        raise ValueError(f"the cell tagged {PARAMETERS!r} does not assign {', '.join(sorted(unknown))}")
    tagged[0].source += "".join(f"\n{name} = {value}" for name, value in numbers.items())


def execute(notebook: nbformat.NotebookNode, timeout: float) -> None:
    """Run all cells in a kernel of this interpreter, whatever kernels are installed; outputs go into the cells.

    Args:
        timeout: seconds for each cell.

    Raises:
        CellExecutionError: a cell raised.
        CellTimeoutError: a cell took longer than `timeout`.
    """
    with tempfile.TemporaryDirectory(prefix="zrl-nb-") as folder:
        kernel = AsyncKernelManager(
            kernel_name="python3",
            kernel_spec_manager=KernelSpecManager(kernel_dirs=[]),
            connection_file=f"{folder}/kernel.json",
            transport="ipc",  # its sockets are in the folder, too
        )
        environment = {
            **os.environ,
            "IPYTHONDIR": folder,  # neither start-up files nor the history of who runs it
            "SDL_VIDEODRIVER": "dummy",  # pictures need no screen, and SDL complains if there is none
        }
        client = NotebookClient(notebook, km=kernel, timeout=timeout, record_timing=False, coalesce_streams=True)
        client.execute(cleanup_kc=True, env=environment, cwd=str(NOTEBOOK.parent))


def clean(notebook: nbformat.NotebookNode) -> None:
    """Leave nothing in it that says on which machine it ran, so that the next run changes little."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = PATH.sub("…", output.text)
            elif "text/plain" in output.get("data", {}):
                output.data["text/plain"] = PATH.sub("…", output.data["text/plain"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small numbers; the file stays as it is")
    parser.add_argument("--seed", type=int, help="another one than the notebook's; the file stays as it is")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a cell may take")
    args = parser.parse_args()
    numbers = (SMALL if args.small else {}) | ({} if args.seed is None else {"SEED": args.seed})
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    if numbers:
        replace_numbers(notebook, numbers)
    try:
        execute(notebook, args.timeout)
    except CellExecutionError as e:
        sys.exit(str(e))
    print(f"{sum(cell.get('execution_count') is not None for cell in notebook.cells)} cells executed")
    if not numbers:
        clean(notebook)
        nbformat.write(notebook, NOTEBOOK)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
