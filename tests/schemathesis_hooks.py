"""Loaded by the command line of schemathesis: it learns identifiers from answers, and must not end the administrator it asks as."""

import os

import schemathesis


def spare(value):
    """Put ann where the administrator stands."""
    if isinstance(value, str):
        return "ann" if any(word in value.lower() for word in os.environ["SCHEMATHESIS_SPARE"].split()) else value
    if isinstance(value, dict):
        return {name: spare(member) for name, member in value.items()}
    return [spare(member) for member in value] if isinstance(value, list) else value


@schemathesis.hook
def before_call(context, case, kwargs):
    case.path_parameters.update(spare(dict(case.path_parameters or {})))
    if isinstance(case.body, (dict, list, str)):
        case.body = spare(case.body)
