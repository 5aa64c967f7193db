"""Errors that end a job, each with a one-line message. `jobs.run` turns them into exit codes."""


class UsageError(Exception):
    """The command or its input is wrong; the message says what, and how to fix it. Exit code 2."""


class JobFailed(Exception):
    """The job could not do all of its work; the message says what is missing. Exit code 1."""


_NAMED = 5  # failed shards, in a message


class ShardsFailed(JobFailed):
    """Some shards failed; all others are finished. The message names the first five."""

    def __init__(self, failures: dict[str, str]) -> None:
        listed = "; ".join(f"{name} ({why})" for name, why in sorted(failures.items())[:_NAMED])
        if len(failures) > _NAMED:
            listed += f"; and {len(failures) - _NAMED:,} more"
        super().__init__(
            f"not done: {listed}; all other shards are. Fix or remove these and run the same command again"
        )


class JobStopped(JobFailed):
    """Raised while working on one shard to end the whole job, because every other shard would fail as well."""


# Not OSErrors: code that skips an unreadable file must not skip it because S3 failed.
class StorageUnavailable(Exception):
    """Files cannot be reached, none of them; they may be later. The message says which, and what was seen."""


class S3Refused(Exception):
    """S3 refuses the request, however often it is repeated; the message says why and how to fix it."""


class S3Unavailable(StorageUnavailable):
    """S3 did not answer properly in any attempt; it may do so later."""
