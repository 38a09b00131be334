"""What pyproject.toml cannot say: three folders of the repository's root are in the wheel, as parts of `mapdistill`.

engine/config/places.py finds them, in a clone and in an installation.
"""

from setuptools import find_packages, setup

FOLDERS = ("ds_configs", "examples", "launch")

setup(
    packages=[*find_packages(include=["engine*", "ga*"]), *(f"mapdistill.{name}" for name in FOLDERS)],
    package_dir={f"mapdistill.{name}": name for name in FOLDERS},
    package_data={f"mapdistill.{name}": ["*"] for name in FOLDERS},
)
