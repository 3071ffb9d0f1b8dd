"""What tests of the modifier share: a scheme that fits tiny models, and a look at its Hessians."""

import torch

SCHEME = {
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True},
        }
    },
    "ignore": ["lm_head"],
}


def hessians_of(modifier, module_list):
    """Whole Hessians that ``modifier`` is about to solve, by name of each module that shares them.

    For use in ``compress_module_list``, of stock GPTQ as well.
    """
    found = {}
    for module in module_list:
        hessian = modifier._hessians[module].clone()
        members = [module]
        if hasattr(modifier, "_groups"):
            hessian = hessian.tril() + hessian.tril(-1).T
            members = modifier._groups[module].members
        found |= {modifier._module_names[member]: hessian for member in members}
    return found


def counts_of(modifier, module_list):
    """How many sequences each of these Hessians is of, by the same names."""
    found = {}
    for module in module_list:
        members = modifier._groups[module].members if hasattr(modifier, "_groups") else [module]
        count = float(modifier._num_samples[module])
        found |= {modifier._module_names[member]: count for member in members}
    return found


def linears(model):
    """Name and module of each Linear."""
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
