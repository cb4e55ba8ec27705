# Read by `make lab` only: what JupyterLab saves is cleaned as nbdev_clean would (outputs stay,
# metadata goes).
from pathlib import Path
from nbdev.clean import clean_jupyter


def clean(model, path, contents_manager, **kwargs):
    clean_jupyter(path=str(Path(contents_manager.root_dir) / path), model=model)


c.ContentsManager.pre_save_hook = clean  # noqa: F821 (c is Jupyter's configuration)
