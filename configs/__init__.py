"""The shipped Hydra configs, for ``hydra.searchpath: [pkg://lightning_cco.configs]``; Hydra calls a package without this file unavailable."""
