"""Which folders are packages; everything else about the project is in pyproject.toml.

`kernels/` is mapped rather than packaged: a top-level package of that name would be taken for Hugging Face's.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["selfnpo_fast", "selfnpo_fast.*"]),
        "selfnpo_fast.configs",
        *find_packages("kernels", include=["selfnpo_kernels", "selfnpo_kernels.*"]),
    ],
    package_dir={"selfnpo_kernels": "kernels/selfnpo_kernels", "selfnpo_fast.configs": "configs"},
    package_data={"selfnpo_fast": ["assets/**/*"], "selfnpo_fast.configs": ["*.yaml"]},
)
