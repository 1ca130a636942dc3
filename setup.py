"""Which packages there are; pyproject.toml says all else.

The shipped configurations lie in train_configs/, beside the package and not in it, where people look for them. They are
installed within it, so that they are found however and wherever it is installed (--user, --target, --prefix).
"""

from setuptools import find_packages, setup

CONFIGS = "swamla_titan.train_configs"

setup(
    packages=[*find_packages(include=["swamla_titan", "swamla_titan.*"]), CONFIGS],
    package_dir={CONFIGS: "train_configs"},
    package_data={
        CONFIGS: ["*.toml"],
        "swamla_titan.kernels.attention": ["*.cu", "*.cuh"],
        "swamla_titan.tools": ["report.html"],
    },
)
