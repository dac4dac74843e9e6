"""Puts model_repository into the wheel, as glm_image/model_repository; everything else is in pyproject.toml."""

from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py

MODELS = "model_repository"


class BuildWithModels(build_py):
    """Copies the models after the packages; an editable installation uses the checkout's."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "glm_image", MODELS)
            copytree(MODELS, target, dirs_exist_ok=True, ignore=ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithModels})
