//! The files of a container on their way to a destination that has an earlier state of them.
//!
//! A destination that is prepared while the container still runs has its files as they were then.
//! [`Mirror`] stays at the source and knows what that was: each round writes what has changed since
//! the one before, the first writes everything. What is not needed any more is said to be removed.
//! The destination brings each round into the trees that it has ([`apply`](mod@super::apply)).
//!
//! ```no_run
//! # use std::path::PathBuf;
//! use livemig::bundle::{Layers, Mirror, Pace, Source};
//!
//! # async fn example(layers: Layers, staging: PathBuf) -> livemig::bundle::Result<()> {
//! let mirror = Mirror::new(vec![
//!     Source::rootfs(layers),
//!     Source::shm("/var/lib/containers/storage/…/userdata/shm".into()),
//!     Source::volume("data", "/var/lib/containers/storage/volumes/data/_data".into()),
//! ]);
//! // While the container runs, as often as it pays. All that it has may be much: no file is made.
//! let (everything, mirror) = mirror.stream(Pace::Running);
//! // … send `everything` …
//! let mirror = mirror.await?.mirror;
//! // Once it is frozen.
//! let (changes, _) = mirror.file(Pace::Frozen, staging).await?;
//! println!("{} bytes left to send", changes.length);
//! # Ok(())
//! # }
//! ```
//!
//! # What a round costs
//! One question to the kernel for each name, and the content of what has changed. A file whose
//! content or times have changed is sent whole, however little of it that was; holes are not sent.
//! In trees on a `tmpfs` all content is read (not sent), since times there do not tell of changes
//! through a mapping.
//!
//! # What the first round presumes
//! That the root file system at the destination is as the image made it: what somebody else has put
//! there before, and the container has removed since, stays. Volumes and `/dev/shm` are emptied
//! first, whatever is in them.

use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::{self, BufWriter, Seek, Write};
use std::path::PathBuf;

use bytes::Bytes;
use futures::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::content::COPY;
use super::delta::{Layers, Summary, unnamed_file};
use super::entries::{Form, Writer};
use super::scan::{Pace, Place, Snapshot, now, scan};
use super::tree::Tree;
use super::{Error, Result, archive, splice};

/// Which of a container's directory trees.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TreeId {
    /// The root file system.
    Rootfs,
    /// `/dev/shm`.
    Shm,
    /// The named volume of that name.
    Volume(String),
}

const ROOTFS: &[u8] = b"rootfs/";
const SHM: &[u8] = b"shm/";
const VOLUMES: &[u8] = b"volumes/";

impl TreeId {
    /// What is in front of its paths in an archive.
    fn prefix(&self) -> Vec<u8> {
        match self {
            TreeId::Rootfs => ROOTFS.to_vec(),
            TreeId::Shm => SHM.to_vec(),
            TreeId::Volume(name) => [VOLUMES, name.as_bytes(), b"/"].concat(),
        }
    }

    /// Takes a name in an archive apart.
    pub(super) fn split(name: &[u8]) -> Option<(TreeId, &[u8])> {
        if let Some(path) = name.strip_prefix(ROOTFS) {
            return Some((TreeId::Rootfs, path));
        }
        if let Some(path) = name.strip_prefix(SHM) {
            return Some((TreeId::Shm, path));
        }
        let rest = name.strip_prefix(VOLUMES)?;
        let end = rest.iter().position(|byte| *byte == b'/')?;
        let volume = std::str::from_utf8(&rest[..end]).ok()?;
        Some((TreeId::Volume(volume.to_owned()), &rest[end + 1..]))
    }
}

impl fmt::Display for TreeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TreeId::Rootfs => f.write_str("root file system"),
            TreeId::Shm => f.write_str("/dev/shm"),
            TreeId::Volume(name) => write!(f, "volume {name}"),
        }
    }
}

/// A tree of the container, at the source.
#[derive(Debug, Clone)]
pub struct Source {
    id: TreeId,
    at: At,
}

#[derive(Debug, Clone)]
enum At {
    Overlay(Layers),
    Directory(PathBuf),
}

impl Source {
    /// The root file system.
    pub fn rootfs(layers: Layers) -> Source {
        Source {
            id: TreeId::Rootfs,
            at: At::Overlay(layers),
        }
    }

    /// The directory that is mounted at `/dev/shm`.
    pub fn shm(directory: PathBuf) -> Source {
        Source {
            id: TreeId::Shm,
            at: At::Directory(directory),
        }
    }

    /// The directory of a named volume.
    pub fn volume(name: impl Into<String>, directory: PathBuf) -> Source {
        Source {
            id: TreeId::Volume(name.into()),
            at: At::Directory(directory),
        }
    }

    fn open(&self) -> Result<Place> {
        match &self.at {
            At::Overlay(layers) => layers.open(),
            At::Directory(path) => Ok(Place {
                view: Tree::open(path)?,
                upper: None,
            }),
        }
    }
}

/// What the destination has of a container's files.
///
/// It goes into each round and comes back from it, unless that fails: what the destination then has
/// is not known.
#[derive(Debug)]
pub struct Mirror {
    trees: Vec<(Source, Option<Snapshot>)>,
}

/// The changes of one round, in a file without a name. It vanishes with the value, and with the
/// process.
#[derive(Debug)]
pub struct Changes {
    /// The archive. Its position does not matter.
    pub file: File,
    /// The archive's length in bytes.
    pub length: u64,
    /// What the archive has in it.
    pub summary: Summary,
}

impl Changes {
    /// The archive in pieces of at most 1 MiB.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes>> + Send {
        splice::content(self.file, self.length)
    }
}

/// A round that has been written.
#[derive(Debug)]
pub struct Round {
    /// What the destination has once it has brought the round in.
    pub mirror: Mirror,
    /// What was in it.
    pub summary: Summary,
}

impl Mirror {
    /// For a destination that has nothing yet.
    pub fn new(sources: Vec<Source>) -> Mirror {
        Mirror {
            trees: sources.into_iter().map(|source| (source, None)).collect(),
        }
    }

    /// The same, with more trees, of which the destination has nothing yet.
    #[must_use]
    pub fn and(mut self, sources: Vec<Source>) -> Mirror {
        let more = sources.into_iter().map(|source| (source, None));
        self.trees.extend(more);
        self
    }

    /// The same, after Podman has mounted the volumes for the first time, which rounds before this have
    /// filled: then it gives their root directories the owner and mode of what they are mounted over, and
    /// what the image has there to those that are empty (`mountNamedVolume` and `fixVolumePermissions` in
    /// Podman's `libpod`).
    #[must_use]
    pub fn volumes_mounted(mut self) -> Mirror {
        for (source, sent) in &mut self.trees {
            if !matches!(source.id, TreeId::Volume(_)) {
                continue;
            }
            match sent {
                Some(snapshot) if !snapshot.is_empty() => snapshot.forget_root(),
                // It is emptied once more.
                sent => *sent = None,
            }
        }
        self
    }

    /// Writes one round. Blocks. It never holds more of the files than one file's metadata and
    /// 256 KiB of content; but some 200 bytes for each name, as long as the mirror lives.
    ///
    /// # Errors
    /// [`Error::NotOverlay`] if the root file system's merged directory is no mounted overlay,
    /// [`Error::Read`] if something cannot be read, [`Error::TooManyEntries`] beyond four million
    /// names in one tree, [`Error::Write`] if `out` fails.
    pub fn write(mut self, pace: Pace, mut out: impl Write) -> Result<Round> {
        let began = now();
        let mut places = Vec::new();
        let mut flushed = HashSet::new();
        for (source, _) in &self.trees {
            let place = source.open()?;
            let changing = place.changing();
            if pace == Pace::Running && flushed.insert(changing.device()?) {
                changing.flush()?;
            }
            places.push(place);
        }
        let mut total = Summary::default();
        for ((source, sent), place) in self.trees.iter_mut().zip(&places) {
            let mut found = scan(place, sent.as_ref(), began)?;
            let prefix = source.id.prefix();
            let mut writer = Writer::new(&place.view, Form::Own { tree: &prefix });
            writer.summary.skipped = found.skipped;
            for entry in &found.entries {
                let digests = found.snapshot.wants_digests();
                let digests = digests.then_some(&mut found.snapshot);
                writer.entry(&mut out, entry, digests)?;
            }
            let mut summary = writer.summary;
            if source.id != TreeId::Rootfs {
                for skipped in &mut summary.skipped {
                    skipped.path = format!("{} in the {}", skipped.path, source.id);
                }
            }
            total.add(summary);
            *sent = Some(found.snapshot);
        }
        archive::end(&mut out).map_err(Error::Write)?;
        out.flush().map_err(Error::Write)?;
        Ok(Round {
            mirror: self,
            summary: total,
        })
    }

    /// Writes one round into an unnamed file in `directory`, beside the runtime's threads.
    ///
    /// # Errors
    /// As [`Mirror::write`]; [`Error::Spool`] if no file can be made.
    pub async fn file(self, pace: Pace, directory: PathBuf) -> Result<(Changes, Mirror)> {
        beside(move || {
            let file =
                unnamed_file(&directory).map_err(|source| Error::Spool { directory, source })?;
            let mut out = BufWriter::with_capacity(COPY, file);
            let Round { mirror, summary } = self.write(pace, &mut out)?;
            let mut file = out.into_inner().map_err(|e| Error::Write(e.into_error()))?;
            let length = file.stream_position().map_err(Error::Write)?;
            let changes = Changes {
                file,
                length,
                summary,
            };
            Ok((changes, mirror))
        })
        .await
    }

    /// Writes one round as a stream, which is read as fast as it is taken. The mirror comes when the
    /// stream has come to its end. A round that fails ends the stream early, without the archive's
    /// end: then the error is there.
    pub fn stream(
        self,
        pace: Pace,
    ) -> (
        impl Stream<Item = Result<Bytes>> + Send,
        impl Future<Output = Result<Round>> + Send,
    ) {
        let (sender, mut receiver) = mpsc::channel(4);
        let round = beside(move || {
            let mut out = BufWriter::with_capacity(COPY, Pieces(sender));
            self.write(pace, &mut out)
        });
        let stream = futures::stream::poll_fn(move |context| {
            receiver
                .poll_recv(context)
                .map(|piece| piece.map(Result::Ok))
        });
        (stream, round)
    }
}

/// Runs something that blocks beside the runtime's threads, from now on.
fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> impl Future<Output = Result<T>> + Send {
    let task = tokio::task::spawn_blocking(work);
    async move {
        match task.await {
            Ok(done) => done,
            Err(lost) => Err(Error::Write(io::Error::other(lost))),
        }
    }
}

/// Passes on what is written as pieces of a stream.
struct Pieces(mpsc::Sender<Bytes>);

impl Write for Pieces {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Bytes::copy_from_slice(piece));
        match sent {
            Ok(()) => Ok(piece.len()),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "changes_tests.rs"]
mod tests;
