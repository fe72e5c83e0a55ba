"""Where tensors pass, signatures are checked while the tests run: types, and the shapes jaxtyping writes there."""

from __future__ import annotations

from hypothesis import settings
from jaxtyping import install_import_hook

# Before these are first imported, for modules are instrumented as they load. An int passes for a float, as in Python.
install_import_hook(
    ["tokenmdp.functional", "tokenmdp.mdp", "tokenmdp.models", "tokenmdp.testing", "tokenmdp.types"],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

# A slow machine is no failure, and a failure comes back when the tests are run again.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")
