"""What every Python model of a bundle does when Triton loads it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

from blipstream.config import ServerConfig
from blipstream.engines import Engine, open_engine
from blipstream.manifest import Manifest
from blipstream.triton.folder import BUNDLE_VARIABLE


class ModelFolder:
    """The folder of one model in its bundle.

    Args:
        args: what the Python backend hands to ``initialize``.

    Raises:
        BundleError: the bundle's manifest is missing or invalid.
        ServerStartError: a setting in the environment is invalid.
    """

    def __init__(self, args: Mapping[str, str]) -> None:
        prepare_process(args["model_name"])
        repository = Path(args["model_repository"])
        bundle = Path(os.environ.get(BUNDLE_VARIABLE) or repository.parent)
        self.path = bundle / repository.name / args["model_version"]
        self.manifest = Manifest.load(bundle)
        self.config = ServerConfig.from_environment()
        self.labels = {"model": args["model_name"], "version": args["model_version"]}

    @property
    def threads(self) -> int:
        """CPU threads of an engine, or of other work on this process's own cores."""
        return self.config.threads or len(os.sched_getaffinity(0))

    def load_engine(self, file: str) -> Engine:
        """Load a graph of this model with the bundle's engine.

        Raises:
            EngineError: the graph is missing or cannot be loaded.
        """
        return open_engine(self.manifest, self.path, file, threads=self.threads)


def prepare_process(model: str) -> None:
    """Set up logging and warnings of the process that Triton started for a model. Both go to standard error."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format=f"%(levelname)s {model}: %(message)s")
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata in images; what matters of it is raised
