//! What can go wrong between Podman and its runtime.

use std::path::PathBuf;
use std::time::Duration;

use super::Verb;

/// Why the runtime could not be stood in for, or did not do its work.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file, directory or link.
    #[error("cannot {doing} {}: {source}", path.display())]
    File {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Something of somebody else's is where livemig's would be.
    #[error("{} is there and was not written by livemig", .0.display())]
    NotOurs(PathBuf),
    /// There is nothing to stand in front of.
    #[error("neither crun nor runc is installed where Podman looks for them")]
    NoRuntime,
    /// There is no CRIU.
    #[error("criu is not installed where Podman looks for programs")]
    NoCriu,
    /// Podman never called.
    #[error("livemig was not called for a {verb} within {} s", within.as_secs())]
    NotCalled {
        /// For what it should have.
        verb: Verb,
        /// How long it was waited for.
        within: Duration,
    },
    /// Somebody called who is no wrapper of ours, or of another version.
    #[error("the call of the runtime cannot be understood: {0}")]
    Call(String),
    /// The wrapper went away in the middle.
    #[error("the runtime's wrapper has gone: {0}")]
    Lost(std::io::Error),
    /// The real runtime failed.
    #[error("{program} failed ({status}): {said}")]
    Failed {
        /// Its name.
        program: String,
        /// How it ended.
        status: String,
        /// Its last words, or those of CRIU.
        said: String,
    },
    /// Whoever called has gone.
    #[error(
        "Podman has died, or has given the container up, before it was told that the container runs"
    )]
    Deserted,
    /// It could not even be started.
    #[error("cannot start {}: {source}", program.display())]
    Start {
        /// Which program.
        program: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl Error {
    /// What to do next, where there is something to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NotOurs(path) => Some(format!(
                "look at {} and move it away if nothing needs it, then run `livemig setup` again",
                path.display()
            )),
            Error::NoRuntime => Some("install one: apt install crun".to_owned()),
            Error::NoCriu => Some("install it: apt install criu".to_owned()),
            Error::NotCalled { .. } => Some(
                "see that Podman's service was started after `livemig setup`: \
                 systemctl restart podman.service; or use --engine rest"
                    .to_owned(),
            ),
            _ => None,
        }
    }

    pub(super) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Error {
        let path = path.into();
        move |source| Error::File {
            doing,
            path,
            source,
        }
    }
}
