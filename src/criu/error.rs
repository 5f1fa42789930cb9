//! What can go wrong around CRIU.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a host or a container could not be examined, or its processes not be stopped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the system could not be read.
    #[error("could not read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// A control file could not be written.
    #[error("could not write {value:?} to {}", path.display())]
    Write {
        /// What was to be written.
        value: &'static str,
        /// The control file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// There is no cgroup that could be frozen to stop the container.
    #[error("found no cgroup to freeze for process {pid}: {why}")]
    NoFreezer {
        /// The container's first process.
        pid: u32,
        /// What was found instead.
        why: String,
    },
    /// A process of the container is in another cgroup than the container.
    #[error("process {pid} could not be moved to {}, where the container is", cgroup.display())]
    Gather {
        /// Which one.
        pid: u32,
        /// The container's cgroup.
        cgroup: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The processes did not stop in time. They have been let go again.
    #[error("the processes in {} did not stop within {} ms", path.display(), waited.as_millis())]
    NotFrozen {
        /// The cgroup.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// An image file of CRIU is not what it should be.
    #[error("CRIU's {image} cannot be read: {what}")]
    Image {
        /// Which file.
        image: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// CRIU's memory pages could not be taken.
    #[error("cannot take the memory that CRIU sends: {0}")]
    Relay(io::Error),
    /// What should be CRIU's memory pages is something else.
    #[error("the stream of memory pages is not CRIU's: {0}")]
    Pages(&'static str),
    /// There are more processes than one container can have.
    #[error("more than {limit} processes below {}", path.display())]
    TooManyProcesses {
        /// Where they were counted.
        path: PathBuf,
        /// The most that are looked at.
        limit: usize,
    },
}

impl Error {
    /// What the operator can do about it, where there is something to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NotFrozen { path, .. } => Some(format!(
                "a process in uninterruptible sleep (state D in `ps`) cannot be stopped: look at \
                 the processes in {}/cgroup.procs",
                path.display()
            )),
            Error::Write { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run livemig as root".into())
            }
            Error::NoFreezer { .. } => {
                Some("see that the container runs and that it has a cgroup of its own".into())
            }
            _ => None,
        }
    }
}
