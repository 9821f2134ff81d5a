"""`python -m vllm_flashprefill.calibrate`, from a checkout."""

from vllm_flashprefill.calibrate import main

if __name__ == "__main__":
    main()
