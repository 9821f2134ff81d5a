"""The entry point that vLLM runs in each of its processes (group ``vllm.general_plugins``)."""

from vllm_flashprefill.config import enabled


def register() -> None:
    """Register the backend if ``FLASHPREFILL=1``. vLLM may call this more than once in a process.

    A vLLM that is not as expected serves dense, after one line that says what is missing.
    """
    if enabled():
        from vllm_flashprefill.patches import registration

        registration.register_or_stay_dense()
