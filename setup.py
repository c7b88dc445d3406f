"""What pyproject.toml cannot say: a wheel carries data/ as vitreg_lib/_data, so that it runs without the repository."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithData(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            shutil.copytree("data", Path(self.build_lib) / "vitreg_lib" / "_data", dirs_exist_ok=True)


setup(cmdclass={"build_py": WithData})
