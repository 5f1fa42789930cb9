//! Why CRIU failed, in CRIU's own words: Podman's answer says only that it did.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// Which of CRIU's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureLog {
    /// Of the last checkpoint: `dump.log`.
    Dump,
    /// Of the last restore: `restore.log`.
    Restore,
    /// Of what fetches memory after a restore: `lazy-pages.log`.
    LazyPages,
}

impl FailureLog {
    fn file_name(self) -> &'static str {
        match self {
            FailureLog::Dump => "dump.log",
            FailureLog::Restore => "restore.log",
            FailureLog::LazyPages => "lazy-pages.log",
        }
    }
}

/// How much of a log's end is read. CRIU gives up soon after the first error, and writes some
/// hundred lines while it cleans up.
const TAIL: u64 = 512 << 10;

/// How many lines are given back.
const LINES: usize = 5;

/// Errors that CRIU goes on after, in containers that restore well.
const HARMLESS: &[&str] = &[
    // CRIU may not raise its own limit without CAP_SYS_RESOURCE.
    "rlimit: Can't setup RLIMIT_NOFILE for self",
];

/// The last `Error` lines of CRIU's log in a container's userdata directory
/// ([`Container::static_dir`](super::Container::static_dir), or
/// [`HostInfo::static_dir`](super::HostInfo::static_dir) if the container cannot be inspected any
/// more). `None` if there is no log, or no error in it.
///
/// This reads files of this host; it is of no use with the socket of another.
pub fn failure_log(static_dir: &Path, which: FailureLog) -> Option<String> {
    let path = static_dir.join(which.file_name());
    let tail = match read_tail(&path) {
        Ok(tail) => tail,
        Err(error) => {
            tracing::debug!(path = %path.display(), %error, "no log of CRIU");
            return None;
        }
    };
    last_errors(&String::from_utf8_lossy(&tail))
}

fn read_tail(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
    let mut tail = Vec::new();
    file.take(TAIL).read_to_end(&mut tail)?;
    Ok(tail)
}

/// CRIU writes `(00.001558) Error (criu/image.c:871): Img trimmed 3/4`, with the process behind
/// the time if it is not the main one.
fn last_errors(log: &str) -> Option<String> {
    let mut errors: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("Error ("))
        .filter(|line| !HARMLESS.iter().any(|harmless| line.contains(harmless)))
        .map(|line| line.find("Error (").map_or(line, |at| &line[at..]))
        .collect();
    let first = errors.len().saturating_sub(LINES);
    let errors = errors.split_off(first);
    (!errors.is_empty()).then(|| errors.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a restore of an archive with a broken image (CRIU 4.2.1).
    const LOG: &str = "\
(00.000000) Version: 4.2.1 (gitid 0)
(00.001428) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
(00.001458) cg: Set 3 is criu one
(00.001558) Error (criu/image.c:871): Img trimmed 3/4
(00.001600)     12: Error (criu/cr-restore.c:1): a child's
";

    #[test]
    fn picks_the_reason() {
        assert_eq!(
            last_errors(LOG).unwrap(),
            "Error (criu/image.c:871): Img trimmed 3/4\nError (criu/cr-restore.c:1): a child's"
        );
        assert_eq!(last_errors("(00.1) fine\n"), None);
    }

    #[test]
    fn reads_the_end_of_a_long_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = "(00.000001) Error (early.c:1): long ago\n".to_owned();
        log.push_str(&"(00.000002) noise\n".repeat(100_000));
        log.push_str("(00.000003) Error (late.c:1): the reason\n");
        std::fs::write(dir.path().join("restore.log"), log).unwrap();
        assert_eq!(
            failure_log(dir.path(), FailureLog::Restore).unwrap(),
            "Error (late.c:1): the reason"
        );
        assert_eq!(failure_log(dir.path(), FailureLog::Dump), None);
    }
}
