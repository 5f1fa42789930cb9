//! The files that a container changed, in the form that Podman's import applies.
//!
//! Which they are, `scan` finds out.
//!
//! # What is written
//! Podman untars `rootfs-diff.tar` over the mounted root file system, *then* removes what
//! `deleted.files` lists (Podman `libpod/container_internal_common.go`, `restore`). Its untar
//! (containers/storage `pkg/archive`, `Unpack`) merges a directory into a directory and otherwise
//! removes what stands at the path before it writes. From this follows:
//!
//! - **Every changed directory is an entry**, parents first, so that no path leads through a
//!   symbolic link of the image.
//! - **A hidden lower directory** is an empty file followed by the directory: the file removes
//!   everything that the image had there. Nothing then needs to be listed as deleted, modification
//!   times stay, and nothing can be deleted that the archive has just written.
//! - **A deletion** is an empty file in the archive *and* a line in `deleted.files`. The file is
//!   there because Podman ≥ 5.8.2 resolves symbolic links in the lines of `deleted.files`, the last
//!   component included: told to remove a link it removes what the link leads to. By then the
//!   link has become an ordinary file.
//! - **The root directory** is called `/`, because an entry called `.` is passed over, and its
//!   mode and owner with it.
//! - **Hard links** are written once, then as links with the same metadata, since the untar applies
//!   a link's mode and times too.
//! - **Times** have nanoseconds (PAX `mtime` and `atime`). One thing is lost: the removal of a
//!   deleted file happens last and so renews its directory's modification time.
//! - **Extended attributes** are `SCHILY.xattr.` records: `user.*`, `trusted.*`,
//!   `security.capability`, `security.ima` and POSIX ACLs. The overlay's own, and labels that
//!   belong to a host (SELinux, AppArmor, Smack, EVM), stay behind.
//! - **Sparse files** are PAX 1.0 sparse entries: holes cost nothing on the wire. Podman's untar
//!   writes holes out as zeros, so at the destination the file takes its full length;
//!   [`Summary::holes`] says how much that is in all.
//! - **Sockets** have no form in tar and are reported. CRIU makes those that are in use again.
//! - **Deletions of names that are not UTF-8** have no form in `deleted.files` and are reported.
//!
//! Nothing is excluded. Podman's own difference leaves out the paths that it mounts over (`/dev`,
//! `/etc/hosts`, `/run/.containerenv` and so on); what the upper directory has there is either the
//! empty stub that the runtime made to mount on, which the destination's runtime makes as well, or
//! something that the container really wrote because nothing was mounted there (`--no-hosts`, a
//! file in `/run`), which must not be lost. What a container writes *into* a mount never reaches
//! the upper directory.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::archive;
use super::content::COPY;
use super::entries::{Form, Writer};
use super::scan::{Entry, Place, What, now, scan};
use super::tree::Tree;
use super::{Error, Result};

/// `OVERLAYFS_SUPER_MAGIC` of `linux/magic.h`.
const OVERLAY_MAGIC: i64 = 0x794c_7630;

/// Where the layers of a container's root file system are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layers {
    /// The directory that takes the container's changes (Podman's `UpperDir`).
    pub upper: PathBuf,
    /// The mounted root file system (Podman's `MergedDir`).
    pub merged: PathBuf,
    /// The image's directories, topmost first (Podman's `LowerDir`, taken apart). They need not be
    /// read: what they contribute shows in the merged view.
    pub lower: Vec<PathBuf>,
}

/// Something that could not be carried over exactly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// The path in the container, starting with `/`; bytes that are not UTF-8 are replaced.
    pub path: String,
    /// What happened to it, as a sentence's end: "is a socket, …".
    pub why: String,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Entries for files, directories and links that exist, the root directory not counted.
    pub files: u64,
    /// Bytes of content that were read and written.
    pub bytes: u64,
    /// Paths where the destination has to have nothing.
    pub deleted: u64,
    /// Bytes of holes that are not in the archive but will be written out at the destination.
    pub holes: u64,
    /// What could not be carried over, or not exactly.
    pub skipped: Vec<Skipped>,
}

impl Summary {
    /// Puts another tree's to it.
    pub(super) fn add(&mut self, other: Summary) {
        self.files += other.files;
        self.bytes += other.bytes;
        self.deleted += other.deleted;
        self.holes += other.holes;
        self.skipped.extend(other.skipped);
    }
}

/// The files that a container changed, as of one moment.
///
/// It is meant for a frozen container. Used on a running one it does no harm (paths are resolved
/// beneath the root file system and never through symbolic links), but describes no single moment.
#[derive(Debug)]
pub struct Delta {
    place: Place,
    entries: Vec<Entry>,
    deleted: Vec<String>,
    bytes: u64,
    skipped: Vec<Skipped>,
}

/// The archive of changed files, in a file without a name, and the list of deleted ones.
#[derive(Debug)]
pub struct DeltaFile {
    /// The archive. Its position does not matter.
    pub file: File,
    /// The archive's length in bytes.
    pub length: u64,
    /// The paths that the destination has to remove, each starting with `/`.
    pub deleted: Vec<String>,
    /// What the archive has in it.
    pub summary: Summary,
}

impl DeltaFile {
    /// Scans the layers and writes the archive into an unnamed file in `directory`, beside the
    /// runtime's threads. The file vanishes with the value, and with the process.
    ///
    /// # Errors
    /// As [`Delta::scan`] and [`Delta::write_tar`]; [`Error::Spool`] if no file can be made.
    pub async fn make(layers: Layers, directory: PathBuf) -> Result<DeltaFile> {
        let task = tokio::task::spawn_blocking(move || {
            let delta = Delta::scan(&layers)?;
            let file =
                unnamed_file(&directory).map_err(|source| Error::Spool { directory, source })?;
            let mut out = BufWriter::with_capacity(COPY, file);
            let summary = delta.write_tar(&mut out)?;
            let mut file = out.into_inner().map_err(|e| Error::Write(e.into_error()))?;
            let length = file.stream_position().map_err(Error::Write)?;
            Ok(DeltaFile {
                file,
                length,
                deleted: delta.deleted,
                summary,
            })
        });
        match task.await {
            Ok(made) => made,
            Err(lost) => Err(Error::Write(io::Error::other(lost))),
        }
    }
}

pub(super) fn unnamed_file(directory: &Path) -> io::Result<File> {
    let mode = Mode::RUSR | Mode::WUSR;
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags | OFlags::TMPFILE, mode) {
        Ok(fd) => Ok(File::from(fd)),
        // Not every file system has unnamed files: then one that is removed at once.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
            let path = directory.join(format!("livemig-delta-{}", std::process::id()));
            let fd = rustix::fs::open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode)?;
            std::fs::remove_file(&path)?;
            Ok(File::from(fd))
        }
        Err(errno) => Err(errno.into()),
    }
}

impl Layers {
    /// Opens them.
    ///
    /// # Errors
    /// [`Error::NotOverlay`] if the merged directory is no mounted overlay, [`Error::Read`] if one
    /// cannot be opened.
    pub(super) fn open(&self) -> Result<Place> {
        let view = Tree::open(&self.merged)?;
        // The type's width differs between architectures.
        #[allow(clippy::unnecessary_cast)]
        if view.magic()? as i64 != OVERLAY_MAGIC {
            return Err(Error::NotOverlay {
                path: self.merged.clone(),
            });
        }
        Ok(Place {
            view,
            upper: Some(Tree::open(&self.upper)?),
        })
    }
}

impl Delta {
    /// Finds what the container added, changed and deleted. Blocks.
    ///
    /// # Errors
    /// [`Error::NotOverlay`] if the merged directory is no mounted overlay, [`Error::Read`] if
    /// something cannot be read, [`Error::TooManyEntries`] beyond four million changes.
    pub fn scan(layers: &Layers) -> Result<Delta> {
        let place = layers.open()?;
        let found = scan(&place, None, now())?;
        let mut delta = Delta {
            place,
            entries: Vec::with_capacity(found.entries.len()),
            deleted: Vec::new(),
            bytes: found.bytes,
            skipped: found.skipped,
        };
        for entry in found.entries {
            if entry.what == What::Deleted {
                let Ok(text) = std::str::from_utf8(&entry.path) else {
                    delta.skipped.push(skipped(
                        &entry.path,
                        "was deleted, but has a name that is not UTF-8 and cannot stand in \
                         Podman's list of deletions: it will be there again",
                    ));
                    continue;
                };
                delta.deleted.push(format!("/{text}"));
            }
            delta.entries.push(entry);
        }
        Ok(delta)
    }

    /// The paths that the container removed and that the image has, each starting with `/`.
    pub fn deleted(&self) -> &[String] {
        &self.deleted
    }

    /// The length of all regular files together, holes included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many files, directories and links were added or changed, the root directory not counted.
    pub fn len(&self) -> usize {
        self.entries.len() - 1 - self.deleted.len()
    }

    /// Whether the container changed nothing at all below the root directory.
    pub fn is_empty(&self) -> bool {
        self.entries.len() == 1
    }

    /// Writes the archive. Blocks. It never holds more than one file's metadata and 256 KiB of
    /// content.
    ///
    /// # Errors
    /// [`Error::Write`] if `out` fails, [`Error::Read`] if a file cannot be read.
    pub fn write_tar(&self, mut out: impl Write) -> Result<Summary> {
        let mut writer = Writer::new(&self.place.view, Form::Podman);
        writer.summary.skipped.clone_from(&self.skipped);
        for entry in &self.entries {
            writer.entry(&mut out, entry, None)?;
        }
        archive::end(&mut out).map_err(Error::Write)?;
        out.flush().map_err(Error::Write)?;
        Ok(writer.summary)
    }
}

/// What could not be carried over, in words.
pub(super) fn skipped(path: &[u8], why: impl Into<String>) -> Skipped {
    Skipped {
        path: format!("/{}", String::from_utf8_lossy(path)),
        why: why.into(),
    }
}

#[cfg(test)]
#[path = "delta_tests.rs"]
mod tests;
