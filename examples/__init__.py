"""Extensions outside of the package, each selected by its class path; see docs/extending.md."""
