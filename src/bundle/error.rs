//! What can go wrong with the image stream.

use std::io;
use std::path::PathBuf;

use super::Checksum;
use super::apply::Refusal;

/// Why the container's files or its image stream could not be read, sent or received.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The merged view of the root file system is no overlay mount, so nothing says what changed.
    #[error("{} is not the mount of an overlay file system", path.display())]
    NotOverlay {
        /// The directory that should be the merged view.
        path: PathBuf,
    },
    /// A directory or file of the container could not be read.
    #[error("could not {action} {}", path.display())]
    Read {
        /// What was being done, as a verb with its object: "open", "list the directory".
        action: &'static str,
        /// What it was being done to.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The container changed more files than one migration may carry.
    #[error("the container has changed more than {limit} files")]
    TooManyEntries {
        /// The most that is carried.
        limit: usize,
    },
    /// The archive of changed files could not be written.
    #[error("could not write the archive of changed files")]
    Write(#[source] io::Error),
    /// The header in front of a stream is missing, or not what it should be.
    #[error("the header of the stream cannot be used: {0}")]
    Header(String),
    /// No room could be made for the archive of changed files.
    #[error("could not make a temporary file in {}", directory.display())]
    Spool {
        /// Where the file was to be.
        directory: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// An entry of an archive of changed files is not what may come from another host.
    #[error("the entry {name} is refused: {why}")]
    Entry {
        /// Its path and tree, or its name as it stands in the archive.
        name: String,
        /// What is wrong with it.
        why: Refusal,
    },
    /// A changed file could not be brought into the container's files at this host.
    #[error("could not {action} {name}")]
    Apply {
        /// What was being done, as a verb: "make", "set the owner of".
        action: &'static str,
        /// Its path and tree.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The archive of changed files is shorter than it said.
    #[error("the archive of changed files ended after {got} of {expected} bytes")]
    ShortDelta {
        /// The length that was declared.
        expected: u64,
        /// What could be read.
        got: u64,
    },
    /// Podman's archive has a difference of its own, which would replace livemig's.
    #[error("Podman's checkpoint carries its own {name}, which would replace livemig's")]
    PodmanHasDelta {
        /// The entry's name.
        name: String,
    },
    /// An archive is not what this host has agreed to.
    #[error("the container's archive is refused: {what}")]
    Forbidden {
        /// What is wrong with it.
        what: String,
    },
    /// CRIU's images are not in the form in which they cross.
    #[error("the stream of CRIU's images cannot be used: {0}")]
    Images(String),
    /// One of CRIU's images.
    #[error("could not {action} {}: {source}", path.display())]
    ImageFile {
        /// What was being done.
        action: &'static str,
        /// To which.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The stream that was being passed on failed.
    #[error("the image stream broke off")]
    Upstream(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What arrived is not in the form that [`super::transfer`] describes.
    #[error("the image stream is not in livemig's form: {what}")]
    Malformed {
        /// What was wrong with it.
        what: &'static str,
    },
    /// The stream ended before its trailer.
    #[error("the image stream ended after {bytes} bytes, before its trailer")]
    Truncated {
        /// Bytes of content that had arrived.
        bytes: u64,
    },
    /// More arrived than was declared.
    #[error("the image stream is longer than the {limit} bytes that were allowed")]
    TooLong {
        /// The most that was allowed.
        limit: u64,
    },
    /// What arrived is not what was sent.
    #[error("the image stream was damaged: {sent} was sent, {received} arrived")]
    Mismatch {
        /// The checksum in the trailer.
        sent: Checksum,
        /// That of what arrived.
        received: Checksum,
    },
}

impl Error {
    pub(super) fn image(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::ImageFile {
            action,
            path,
            source,
        }
    }

    /// Takes an error of ours out of the system's error type, in which it went through a reader.
    pub(crate) fn from_reader(error: io::Error) -> Error {
        super::transfer::from_io(error)
    }

    /// What the operator can do about it, where there is something to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NotOverlay { .. } => Some(
                "livemig carries changed files for Podman's overlay storage driver only: see \
                 `podman info --format '{{.Store.GraphDriverName}}'`"
                    .into(),
            ),
            Error::Forbidden { .. } | Error::Entry { .. } => Some(
                "it is not the container that was offered: look at what the source runs, and revoke it \
                 (livemig revoke HOST) unless that can be explained"
                    .into(),
            ),
            Error::TooManyEntries { .. } => {
                Some("keep the data in a named volume, which travels in another way".into())
            }
            Error::Spool { directory, .. } => Some(format!("make room in {}", directory.display())),
            Error::Apply { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room for the files that the container has changed".into())
            }
            Error::Write(source) if source.kind() == io::ErrorKind::StorageFull => {
                Some("make room for the files that the container has changed".into())
            }
            Error::ImageFile { path, source, .. } if source.kind() == io::ErrorKind::StorageFull => {
                Some(format!(
                    "the container's memory does not fit: make room where {} is",
                    path.display()
                ))
            }
            Error::Mismatch { .. } | Error::Truncated { .. } => Some(
                "nothing was restored from it; try again, and check the network between the hosts \
                 if it happens twice"
                    .into(),
            ),
            _ => None,
        }
    }
}
