"""Lists the packages: `find:` does not see the mapped folders, and a package left out is missing from the wheel."""

from setuptools import find_packages, setup

MAPPED = {"exitkit.methods": "methods", "exitkit.benchmarks": "benchmarks"}
ours = find_packages(include=["exitkit", "exitkit.*"])
mapped = [f"{name}.{sub}" for name, folder in MAPPED.items() for sub in find_packages(folder)]
setup(packages=[*ours, *MAPPED, *mapped])
