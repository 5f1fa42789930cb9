//! The files that a container changed, in the form that Podman's import applies.
//!
//! # What is read
//! A container's root file system is an overlay. Its *upper* directory says **where** something
//! changed; the *merged* mount says **what** is there now. Content, owners, modes and attributes
//! are therefore always taken from the merged view, which makes metadata-only copies
//! (`trusted.overlay.metacopy`) and whiteouts of either kind come out right without knowing their
//! form: a name that the upper directory has and the merged view has not is a deletion. Only
//! directories need a look at the upper directory's own attributes: where
//! `trusted.overlay.opaque` is `y`, or `trusted.overlay.redirect` is set (a renamed directory), the
//! lower layers' directory of that name is hidden, and all that the merged view has below it is
//! taken, wherever it comes from.
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

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::archive::{self, Extent, Head, MAX_EXTENDED, Moment, Type};
use super::{Error, Result};

/// More changed files than this are refused: each is held in memory by its name.
const MAX_ENTRIES: usize = 4_000_000;
/// Longer paths are refused by Podman's untar, which uses them whole in system calls that take at
/// most 4,096 bytes (`PATH_MAX`), with its own prefix in front.
const MAX_PATH: usize = 3_500;
/// Holes that are smaller in all are written as zeros.
const MIN_HOLES: u64 = 64 << 10;
/// With more extents the sparse map would come near [`MAX_EXTENDED`]: small holes are filled.
const MAX_EXTENTS: usize = 16_384;
/// Extended attributes of one file beyond this do not fit into its header.
const MAX_ATTRIBUTES: usize = MAX_EXTENDED - (64 << 10);
/// Content is copied in pieces of this size.
const COPY: usize = 256 << 10;
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
    /// Paths in `deleted.files`.
    pub deleted: u64,
    /// Bytes of holes that are not in the archive but will be written out at the destination.
    pub holes: u64,
    /// What could not be carried over, or not exactly.
    pub skipped: Vec<Skipped>,
}

/// The files that a container changed, as of one moment.
///
/// It is meant for a frozen container. Used on a running one it does no harm (paths are resolved
/// beneath the root file system and never through symbolic links), but describes no single moment.
#[derive(Debug)]
pub struct Delta {
    merged: OwnedFd,
    merged_path: PathBuf,
    entries: Vec<Entry>,
    deleted: Vec<String>,
    bytes: u64,
    skipped: Vec<Skipped>,
}

#[derive(Debug)]
struct Entry {
    /// Relative to the root, without a slash at either end.
    path: Box<[u8]>,
    what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// A directory that is merged with the image's.
    Directory,
    /// A directory that replaces the image's.
    FreshDirectory,
    /// Anything else that exists.
    Other,
    /// Another name for what the entry with that index names.
    Link(u32),
    /// Nothing: the image has something there that the container removed.
    Deleted,
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

fn unnamed_file(directory: &Path) -> io::Result<File> {
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

/// A hard-linked file, identified where its identity is reliable: in the upper directory if it has
/// been copied there, else in the merged view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Identity {
    Upper(u64, u64),
    Merged(u64, u64),
}

impl Delta {
    /// Finds what the container added, changed and deleted. Blocks.
    ///
    /// # Errors
    /// [`Error::NotOverlay`] if the merged directory is no mounted overlay, [`Error::Read`] if
    /// something cannot be read, [`Error::TooManyEntries`] beyond four million changes.
    pub fn scan(layers: &Layers) -> Result<Delta> {
        let merged = open_root(&layers.merged)?;
        let upper = open_root(&layers.upper)?;
        let kind = rustix::fs::fstatfs(&merged)
            .map_err(|e| failed("look at the file system of", &layers.merged, e))?;
        // The type's width differs between architectures.
        #[allow(clippy::unnecessary_cast)]
        if kind.f_type as i64 != OVERLAY_MAGIC {
            return Err(Error::NotOverlay {
                path: layers.merged.clone(),
            });
        }
        let mut scan = Scan {
            upper: Tree {
                root: upper,
                path: &layers.upper,
            },
            merged: Tree {
                root: merged,
                path: &layers.merged,
            },
            entries: Vec::new(),
            deleted: Vec::new(),
            bytes: 0,
            skipped: Vec::new(),
            links: HashMap::new(),
        };
        scan.walk()?;
        let Scan {
            merged,
            entries,
            deleted,
            bytes,
            skipped,
            ..
        } = scan;
        Ok(Delta {
            merged: merged.root,
            merged_path: layers.merged.clone(),
            entries,
            deleted,
            bytes,
            skipped,
        })
    }

    /// The paths that the container removed and that the image has, each starting with `/`.
    pub fn deleted(&self) -> &[String] {
        &self.deleted
    }

    /// The length of all regular files together, holes included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many files, directories and links were added or changed.
    pub fn len(&self) -> usize {
        self.entries.len() - self.deleted.len()
    }

    /// Whether the container changed nothing at all below the root directory.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Writes the archive. Blocks. It never holds more than one file's metadata and 256 KiB of
    /// content.
    ///
    /// # Errors
    /// [`Error::Write`] if `out` fails, [`Error::Read`] if a file cannot be read.
    pub fn write_tar(&self, mut out: impl Write) -> Result<Summary> {
        let mut writer = Writer {
            tree: Tree {
                root: self.merged.as_fd(),
                path: &self.merged_path,
            },
            summary: Summary {
                deleted: self.deleted.len() as u64,
                skipped: self.skipped.clone(),
                ..Summary::default()
            },
            buffer: vec![0; COPY],
        };
        writer.entry(&mut out, b"", What::Directory, None)?;
        writer.summary.files = 0;
        for entry in &self.entries {
            let first = match entry.what {
                What::Link(index) => self.entries.get(index as usize).map(|e| &*e.path),
                _ => None,
            };
            writer.entry(&mut out, &entry.path, entry.what, first)?;
        }
        archive::end(&mut out).map_err(Error::Write)?;
        out.flush().map_err(Error::Write)?;
        Ok(writer.summary)
    }
}

fn open_root(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(|e| failed("open", path, e))
}

fn failed(action: &'static str, path: &Path, errno: Errno) -> Error {
    Error::Read {
        action,
        path: path.to_owned(),
        source: errno.into(),
    }
}

/// A directory tree whose paths are resolved beneath its root, and through no symbolic link.
#[derive(Debug)]
struct Tree<'a, Fd: AsFd> {
    root: Fd,
    path: &'a Path,
}

/// A file of a tree, opened without any right but to look at it.
#[derive(Debug)]
struct Node {
    fd: OwnedFd,
    stat: Stat,
}

impl<Fd: AsFd> Tree<'_, Fd> {
    fn open(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        rustix::fs::openat2(
            &self.root,
            path,
            flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
    }

    /// Looks at a path; `None` if there is nothing.
    fn node(&self, path: &[u8]) -> Result<Option<Node>> {
        let fd = match self.open(path, OFlags::PATH) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(self.failed("open", path, errno)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("look at", path, e))?;
        Ok(Some(Node { fd, stat }))
    }

    /// The names in a directory, sorted.
    fn names(&self, path: &[u8]) -> Result<Vec<Vec<u8>>> {
        let fd = match self.open(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            // Gone since it was seen, in a container that runs.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
            Err(errno) => return Err(self.failed("open", path, errno)),
        };
        let list = |errno| self.failed("list the directory", path, errno);
        let mut names = Vec::new();
        for entry in Dir::new(fd).map_err(list)? {
            let entry = entry.map_err(list)?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn failed(&self, action: &'static str, path: &[u8], errno: Errno) -> Error {
        failed(
            action,
            &self.path.join(std::ffi::OsStr::from_bytes(path)),
            errno,
        )
    }
}

impl Node {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// A path that leads to exactly this file, also where it is a symbolic link.
    fn handle(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// The value of an extended attribute; `None` where there is none.
    fn attribute(&self, name: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; 256];
        loop {
            match rustix::fs::getxattr(self.handle(), name, &mut value[..]) {
                Ok(size) => {
                    value.truncate(size);
                    return Ok(Some(value));
                }
                // The kernel keeps values of at most 64 KiB (XATTR_SIZE_MAX).
                Err(Errno::RANGE) if value.len() < 1 << 16 => value.resize(1 << 16, 0),
                Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// The names of the extended attributes.
    fn attribute_names(&self) -> rustix::io::Result<Vec<Vec<u8>>> {
        let mut list = vec![0; 256];
        loop {
            match rustix::fs::listxattr(self.handle(), &mut list[..]) {
                Ok(size) => {
                    let names = list[..size]
                        .split(|b| *b == 0)
                        .filter(|name| !name.is_empty());
                    let mut names: Vec<_> = names.map(<[u8]>::to_vec).collect();
                    names.sort_unstable();
                    return Ok(names);
                }
                // The kernel lists at most 64 KiB (XATTR_LIST_MAX).
                Err(Errno::RANGE) if list.len() < 1 << 17 => list.resize(list.len() * 4, 0),
                Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// Whether this directory of an upper layer hides the lower layers' directory of its name.
    fn hides_lower(&self) -> rustix::io::Result<bool> {
        // "x" stands for a directory that merely has whiteouts of the attribute form in it.
        Ok(
            self.attribute(b"trusted.overlay.opaque")?.as_deref() == Some(b"y")
                || self.attribute(b"trusted.overlay.redirect")?.is_some(),
        )
    }
}

struct Scan<'a> {
    upper: Tree<'a, OwnedFd>,
    merged: Tree<'a, OwnedFd>,
    entries: Vec<Entry>,
    deleted: Vec<String>,
    bytes: u64,
    skipped: Vec<Skipped>,
    links: HashMap<Identity, u32>,
}

impl Scan<'_> {
    /// Walks depth first, parents before what they hold, in the order of names.
    fn walk(&mut self) -> Result<()> {
        // Paths to look at, the next one last; with each, whether everything that the merged view
        // has there is new.
        let mut waiting: Vec<(Vec<u8>, bool)> = Vec::new();
        self.list(b"", false, &mut waiting)?;
        while let Some((path, whole)) = waiting.pop() {
            if self.look(&path, whole)? {
                let whole = whole
                    || self
                        .entries
                        .last()
                        .is_some_and(|e| e.what == What::FreshDirectory);
                self.list(&path, whole, &mut waiting)?;
            }
        }
        Ok(())
    }

    /// Adds what a directory holds to what is waiting.
    fn list(&mut self, path: &[u8], whole: bool, waiting: &mut Vec<(Vec<u8>, bool)>) -> Result<()> {
        let mut names = if whole {
            self.merged.names(path)?
        } else {
            self.upper.names(path)?
        };
        names.sort_unstable_by_key(|name| Reverse(name.clone()));
        for name in names {
            let child = if path.is_empty() {
                name
            } else {
                [path, b"/", name.as_slice()].concat()
            };
            waiting.push((child, whole));
        }
        Ok(())
    }

    /// Takes down one path, and says whether it is a directory to go into.
    fn look(&mut self, path: &[u8], whole: bool) -> Result<bool> {
        if path.len() > MAX_PATH {
            self.skip(
                path,
                "has a path that is too long for Podman's import: left behind",
            );
            return Ok(false);
        }
        let Some(node) = self.merged.node(path)? else {
            if !whole {
                self.delete(path)?;
            }
            return Ok(false);
        };
        let what = match node.kind() {
            FileType::Directory if whole => What::Directory,
            FileType::Directory => {
                let hides = match self.upper.node(path)? {
                    Some(upper) => upper
                        .hides_lower()
                        .map_err(|e| self.upper.failed("read the overlay's marks of", path, e))?,
                    None => false,
                };
                if hides {
                    What::FreshDirectory
                } else {
                    What::Directory
                }
            }
            FileType::Socket => {
                self.skip(
                    path,
                    "is a socket, which an archive cannot hold: left behind",
                );
                return Ok(false);
            }
            kind => {
                let what = self.link(path, &node)?;
                if kind == FileType::RegularFile && what == What::Other {
                    self.bytes += u64::try_from(node.stat.st_size).unwrap_or(0);
                }
                what
            }
        };
        self.add(path, what)?;
        Ok(matches!(what, What::Directory | What::FreshDirectory))
    }

    /// Whether a file is another name of one that has been taken down.
    fn link(&mut self, path: &[u8], merged: &Node) -> Result<What> {
        let upper = self.upper.node(path)?;
        // The widths of these fields differ between architectures.
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
        let identity = match &upper {
            Some(node) if u64::from(node.stat.st_nlink) > 1 => {
                Identity::Upper(node.stat.st_dev as u64, node.stat.st_ino as u64)
            }
            None if u64::from(merged.stat.st_nlink) > 1 => {
                Identity::Merged(merged.stat.st_dev as u64, merged.stat.st_ino as u64)
            }
            _ => return Ok(What::Other),
        };
        if let Some(first) = self.links.get(&identity) {
            return Ok(What::Link(*first));
        }
        // There are at most MAX_ENTRIES.
        self.links.insert(identity, self.entries.len() as u32);
        Ok(What::Other)
    }

    fn delete(&mut self, path: &[u8]) -> Result<()> {
        match std::str::from_utf8(path) {
            Ok(text) => {
                self.deleted.push(format!("/{text}"));
                self.add(path, What::Deleted)
            }
            Err(_) => {
                self.skip(
                    path,
                    "was deleted, but has a name that is not UTF-8 and cannot stand in Podman's \
                     list of deletions: it will be there again",
                );
                Ok(())
            }
        }
    }

    fn add(&mut self, path: &[u8], what: What) -> Result<()> {
        if self.entries.len() >= MAX_ENTRIES {
            return Err(Error::TooManyEntries { limit: MAX_ENTRIES });
        }
        self.entries.push(Entry {
            path: path.into(),
            what,
        });
        Ok(())
    }

    fn skip(&mut self, path: &[u8], why: &str) {
        self.skipped.push(skipped(path, why));
    }
}

fn skipped(path: &[u8], why: impl Into<String>) -> Skipped {
    Skipped {
        path: format!("/{}", String::from_utf8_lossy(path)),
        why: why.into(),
    }
}

struct Writer<'a, Fd: AsFd> {
    tree: Tree<'a, Fd>,
    summary: Summary,
    buffer: Vec<u8>,
}

impl<Fd: AsFd> Writer<'_, Fd> {
    fn entry(
        &mut self,
        out: &mut impl Write,
        path: &[u8],
        what: What,
        first: Option<&[u8]>,
    ) -> Result<()> {
        if what == What::Deleted {
            return Head::empty(path).write(out).map_err(Error::Write);
        }
        let Some(node) = self.tree.node(path)? else {
            self.skip(path, "vanished while the archive was written");
            return Ok(());
        };
        let kind = match node.kind() {
            _ if first.is_some() => Type::HardLink,
            FileType::Directory => Type::Directory,
            FileType::RegularFile => Type::Regular,
            FileType::Symlink => Type::Symlink,
            FileType::CharacterDevice => Type::Character,
            FileType::BlockDevice => Type::Block,
            FileType::Fifo => Type::Fifo,
            _ => {
                self.skip(path, "became something that an archive cannot hold");
                return Ok(());
            }
        };
        if what == What::FreshDirectory {
            // Removes whatever the image has at this path, and all that is in it.
            Head::empty(path).write(out).map_err(Error::Write)?;
        }
        let target = match kind {
            Type::HardLink => first.unwrap_or_default().to_vec(),
            Type::Symlink => self.target(path, &node)?,
            _ => Vec::new(),
        };
        let attributes = match kind {
            // They are the first name's.
            Type::HardLink => Vec::new(),
            _ => self.attributes(path, &node)?,
        };
        let (modified, accessed) = times(&node.stat);
        let head = Head {
            path: if path.is_empty() { b"/" } else { path },
            kind,
            mode: node.stat.st_mode & 0o7777,
            uid: node.stat.st_uid,
            gid: node.stat.st_gid,
            size: 0,
            modified,
            accessed: Some(accessed),
            target: &target,
            device: match kind {
                Type::Character | Type::Block => (
                    rustix::fs::major(node.stat.st_rdev as _),
                    rustix::fs::minor(node.stat.st_rdev as _),
                ),
                _ => (0, 0),
            },
            attributes: &attributes,
            extents: None,
        };
        self.summary.files += 1;
        if kind == Type::Regular {
            self.regular(out, path, &node, head)
        } else {
            head.write(out).map_err(Error::Write)
        }
    }

    fn regular(
        &mut self,
        out: &mut impl Write,
        path: &[u8],
        node: &Node,
        head: Head<'_>,
    ) -> Result<()> {
        let size = u64::try_from(node.stat.st_size).unwrap_or(0);
        if size == 0 {
            return head.write(out).map_err(Error::Write);
        }
        let open = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // Reading must not count as an access, where that can be had.
        let fd = match rustix::fs::open(node.handle(), open | OFlags::NOATIME, Mode::empty()) {
            Err(Errno::PERM) => rustix::fs::open(node.handle(), open, Mode::empty()),
            other => other,
        }
        .map_err(|e| self.tree.failed("open", path, e))?;
        let mut file = File::from(fd);
        // st_blocks counts 512 bytes each, whatever the file system's blocks are.
        let allocated = u64::try_from(node.stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let extents = if allocated < size {
            extents(&file, size).map_err(|e| self.tree.failed("find the holes of", path, e))?
        } else {
            None
        };
        let whole = [Extent {
            offset: 0,
            length: size,
        }];
        let stretches = extents.as_deref().unwrap_or(&whole);
        let head = Head {
            size,
            extents: extents.as_deref(),
            ..head
        };
        head.write(out).map_err(Error::Write)?;
        let mut copied = 0;
        let mut short = false;
        for stretch in stretches {
            if extents.is_some() {
                file.seek(SeekFrom::Start(stretch.offset))
                    .map_err(|source| self.unreadable(path, source))?;
            }
            let mut left = stretch.length;
            while left > 0 {
                let most = usize::try_from(left).map_or(COPY, |left| left.min(COPY));
                let piece = &mut self.buffer[..most];
                let got = if short {
                    0
                } else {
                    match file.read(piece) {
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                        got => got.map_err(|source| self.unreadable(path, source))?,
                    }
                };
                // The header has promised a length.
                short |= got == 0;
                let piece = if short {
                    self.buffer[..most].fill(0);
                    &self.buffer[..most]
                } else {
                    &self.buffer[..got]
                };
                out.write_all(piece).map_err(Error::Write)?;
                left -= piece.len() as u64;
                copied += piece.len() as u64;
            }
        }
        if short {
            self.skip(
                path,
                "shrank while it was read: its end was filled with zeros",
            );
        }
        self.summary.bytes += copied;
        self.summary.holes += size - copied;
        archive::pad(out, copied).map_err(Error::Write)
    }

    fn unreadable(&self, path: &[u8], source: io::Error) -> Error {
        let path = self.tree.path.join(std::ffi::OsStr::from_bytes(path));
        Error::Read {
            action: "read",
            path,
            source,
        }
    }

    /// Where a symbolic link leads.
    ///
    /// Podman before 5.8.2 refuses a whole archive for one link that climbs above the root. `..` in
    /// the root is the root, so leading climbs that are too many can be left out.
    fn target(&mut self, path: &[u8], node: &Node) -> Result<Vec<u8>> {
        let target = rustix::fs::readlinkat(&node.fd, c"", Vec::new())
            .map_err(|e| self.tree.failed("read the link", path, e))?
            .into_bytes();
        let depth = path.iter().filter(|b| **b == b'/').count();
        match clamped(&target, depth) {
            Some(clamped) => {
                self.skip(
                    path,
                    format!(
                        "leads above the root directory: carried over as {}, which leads to the same place",
                        String::from_utf8_lossy(&clamped)
                    ),
                );
                Ok(clamped)
            }
            None => Ok(target),
        }
    }

    fn attributes(&mut self, path: &[u8], node: &Node) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let failed =
            |tree: &Tree<'_, Fd>, errno| tree.failed("read the attributes of", path, errno);
        let names = node.attribute_names().map_err(|e| failed(&self.tree, e))?;
        let mut attributes = Vec::new();
        let mut size = 0;
        for name in names.into_iter().filter(|name| travels(name)) {
            let Some(value) = node.attribute(&name).map_err(|e| failed(&self.tree, e))? else {
                continue;
            };
            let text = String::from_utf8_lossy(&name).into_owned();
            if name.contains(&b'=') {
                // A PAX record's key ends at the first one.
                self.skip(
                    path,
                    format!("lost its attribute {text}, whose name contains `=`"),
                );
            } else if size + name.len() + value.len() > MAX_ATTRIBUTES {
                self.skip(
                    path,
                    format!("lost its attribute {text}: together they are too large"),
                );
            } else {
                size += name.len() + value.len();
                attributes.push((name, value));
            }
        }
        Ok(attributes)
    }

    fn skip(&mut self, path: &[u8], why: impl Into<String>) {
        self.summary.skipped.push(skipped(path, why));
    }
}

/// Whether an extended attribute means the same on another host.
fn travels(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || (name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay."))
        || name.starts_with(b"system.posix_acl_")
        || name == b"security.capability"
        || name == b"security.ima"
}

/// A link's target without the leading `..` that climb out of a directory at that depth; `None` if
/// there is none to leave out.
fn clamped(target: &[u8], depth: usize) -> Option<Vec<u8>> {
    let mut rest = target;
    let mut climbs = 0;
    while let Some(next) = rest.strip_prefix(b"..") {
        match next {
            [] => rest = next,
            [b'/', ..] => rest = &next[next.iter().take_while(|b| **b == b'/').count()..],
            _ => break,
        }
        climbs += 1;
    }
    if climbs <= depth {
        return None;
    }
    let mut clamped = b"../".repeat(depth);
    clamped.extend_from_slice(rest);
    if clamped.is_empty() {
        clamped.push(b'.');
    }
    Some(clamped)
}

/// When a file was modified and read last.
// The widths of these fields differ between architectures.
#[allow(clippy::unnecessary_cast)]
fn times(stat: &Stat) -> (Moment, Moment) {
    let moment = |seconds: i64, nanoseconds: u64| Moment {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
    };
    (
        moment(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
        moment(stat.st_atime as i64, stat.st_atime_nsec as u64),
    )
}

/// The stretches of a file that have data, or `None` if it has too few holes to bother.
fn extents(file: &File, size: u64) -> rustix::io::Result<Option<Vec<Extent>>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            // No data behind this point.
            Ok(_) | Err(Errno::NXIO) => break,
            // This file system does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
                return Ok(None);
            }
            Err(errno) => return Err(errno),
        };
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?.clamp(start, size);
        if end == start {
            break;
        }
        extents.push(Extent {
            offset: start,
            length: end - start,
        });
        at = end;
        if extents.len() > 2 * MAX_EXTENTS {
            fill_small_holes(&mut extents);
        }
    }
    fill_small_holes(&mut extents);
    let data: u64 = extents.iter().map(|e| e.length).sum();
    if size - data < MIN_HOLES {
        rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
        return Ok(None);
    }
    // A hole at the end is told by an extent without length behind it.
    if extents
        .last()
        .is_none_or(|last| last.offset + last.length < size)
    {
        extents.push(Extent {
            offset: size,
            length: 0,
        });
    }
    Ok(Some(extents))
}

/// Joins extents over ever larger holes until there are few enough.
fn fill_small_holes(extents: &mut Vec<Extent>) {
    let mut hole = 4096;
    while extents.len() > MAX_EXTENTS {
        hole *= 2;
        extents.dedup_by(|next, last| {
            let near = next.offset - (last.offset + last.length) < hole;
            if near {
                last.length = next.offset + next.length - last.offset;
            }
            near
        });
    }
}

#[cfg(test)]
#[path = "delta_tests.rs"]
mod tests;
