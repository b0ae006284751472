"""Commands of diffusers-vae, run in this process."""

from diffusers_vae import cli


def call(capsys, *arguments):
    """Exit code, and what was printed to stdout and to stderr."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()
