"""The paper's experiments (arXiv 2606.21497) as resumable runs, with its figures beside ours."""
