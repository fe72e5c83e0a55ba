"""TokenMDP: language models aligned as what they are, policies on a Markov decision process with known dynamics."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("tokenmdp")
except PackageNotFoundError:  # a source tree that nobody installed
    __version__ = "0.0.0"
