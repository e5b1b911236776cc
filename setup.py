"""Copies the demo into the package that is built, beside what pyproject.toml says of it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithDemo(build_py):
    """Builds the package with `data/clipart`, unless it stays in the checkout."""

    def run(self) -> None:  # noqa: D102
        super().run()
        if not self.editable_mode:
            shutil.copytree("data/clipart", Path(self.build_lib, "headstart/clipart"), dirs_exist_ok=True)


setup(cmdclass={"build_py": WithDemo})
