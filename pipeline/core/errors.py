"""What can end a job: each error is one line for the user. `jobs.run` turns them into exit codes."""


class UsageError(Exception):
    """The command or its input is wrong: one line that says what, and how to mend it. Exit code 2."""


class JobFailed(Exception):
    """The job could not do all of its work: one line that says what is missing. Exit code 1."""


class ShardsFailed(JobFailed):
    """Some shards could not be done; all others are."""

    def __init__(self, failures: dict[str, str]) -> None:
        listed = "; ".join(f"{name} ({why})" for name, why in sorted(failures.items()))
        super().__init__(
            f"not done: {listed}; all other shards are. Mend or remove these and run the same command again"
        )


class JobStopped(JobFailed):
    """Raised by the work on one shard: no other shard would fare better, so that the whole job ends, with this line."""


# Not OSErrors: code that skips an unreadable file must not skip it because S3 failed.
class S3Refused(Exception):
    """S3 will not do this however often it is asked; the message says why and how to mend it."""


class S3Unavailable(Exception):
    """S3 did not answer properly in any of the attempts; later it may."""
