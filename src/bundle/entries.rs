//! The entries of an archive, made from what a scan found.
//!
//! There are two forms, for two readers. Podman's is told in [`delta`](super::delta), livemig's own
//! in [`apply`](mod@super::apply).

use std::collections::HashSet;
use std::io::Write;

use rustix::fs::{FileType, Stat};

use super::archive::{self, Head, MAX_EXTENDED, Moment, Type};
use super::content::Content;
use super::delta::{Summary, skipped};
use super::scan::{Entry, Snapshot, What};
use super::tree::{Node, Tree, travels};
use super::{Error, Result};

/// Extended attributes of one file beyond this do not fit into its header.
const MAX_ATTRIBUTES: usize = MAX_EXTENDED - (64 << 10);

/// Who reads the archive.
#[derive(Debug, Clone, Copy)]
pub(super) enum Form<'a> {
    /// Podman's untar, which knows nothing but files.
    Podman,
    /// livemig, which knows removals, and several trees under names of their own.
    Own {
        /// In front of each path, with a slash at its end.
        tree: &'a [u8],
    },
}

/// Writes entries of a tree.
pub(super) struct Writer<'a> {
    tree: &'a Tree,
    form: Form<'a>,
    pub summary: Summary,
    buffer: Vec<u8>,
    /// What was there when the tree was scanned and has gone since.
    vanished: HashSet<Box<[u8]>>,
}

impl<'a> Writer<'a> {
    pub fn new(tree: &'a Tree, form: Form<'a>) -> Writer<'a> {
        Writer {
            tree,
            form,
            summary: Summary::default(),
            buffer: Vec::new(),
            vanished: HashSet::new(),
        }
    }

    /// The name in the archive.
    fn named(&self, path: &[u8]) -> Vec<u8> {
        match self.form {
            Form::Podman if path.is_empty() => b"/".to_vec(),
            Form::Podman => path.to_vec(),
            Form::Own { tree } => [tree, path].concat(),
        }
    }

    /// Says that there is nothing at a path.
    fn removal(&self, out: &mut impl Write, path: &[u8]) -> Result<()> {
        let kind = match self.form {
            // Its untar removes what stands where a file is to be.
            Form::Podman => Type::Regular,
            Form::Own { .. } => Type::Removal,
        };
        let head = Head {
            kind,
            ..Head::empty(path)
        };
        head.write(out).map_err(Error::Write)
    }

    /// Writes one entry, and takes the digest of its content down if somebody wants it.
    pub fn entry(
        &mut self,
        out: &mut impl Write,
        entry: &Entry,
        mut digests: Option<&mut Snapshot>,
    ) -> Result<()> {
        let path = &*entry.path;
        let name = self.named(path);
        if entry.what == What::Deleted {
            self.summary.deleted += 1;
            return self.removal(out, &name);
        }
        let Some(node) = self.tree.node(path)? else {
            self.skip(path, "vanished while the archive was written");
            self.vanished.insert(path.into());
            return Ok(());
        };
        let first = match &entry.what {
            What::Link(first)
                if !self.vanished.contains(first) && !self.is_shortened(first, &node)? =>
            {
                Some(first)
            }
            _ => None,
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
                self.vanished.insert(path.into());
                return Ok(());
            }
        };
        if entry.what == What::FreshDirectory {
            // Removes whatever there is at this path, and all that is in it.
            self.removal(out, &name)?;
        }
        let target = match (kind, first) {
            (Type::HardLink, Some(first)) => self.named(first),
            (Type::Symlink, _) => self.target(path, &node)?,
            _ => Vec::new(),
        };
        let attributes = match kind {
            // They are the first name's.
            Type::HardLink => Vec::new(),
            _ => self.attributes(path, &node)?,
        };
        let (modified, accessed) = times(&node.stat);
        let head = Head {
            path: &name,
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
        if !path.is_empty() {
            self.summary.files += 1;
        }
        if let (Some(first), Some(snapshot)) = (first, digests.as_deref_mut()) {
            snapshot.note_link(path, first);
        }
        if kind != Type::Regular || node.stat.st_size == 0 {
            return head.write(out).map_err(Error::Write);
        }
        let content = Content::open(&node).map_err(|e| self.tree.failed("open", path, e))?;
        let digest = self.regular(out, path, content, head, digests.is_some())?;
        if let (Some(snapshot), Some(digest)) = (digests, digest) {
            snapshot.note(path, digest);
        }
        Ok(())
    }

    fn regular(
        &mut self,
        out: &mut impl Write,
        path: &[u8],
        content: Content,
        head: Head<'_>,
        digested: bool,
    ) -> Result<Option<blake3::Hash>> {
        let size = content.size;
        let head = Head {
            size,
            extents: content.extents.as_deref(),
            ..head
        };
        head.write(out).map_err(Error::Write)?;
        let mut digest = digested.then(|| content.begun_digest());
        let done = content
            .read(&mut self.buffer, |piece| {
                if let Some(digest) = &mut digest {
                    digest.update(piece);
                }
                out.write_all(piece)
            })
            .map_err(|source| self.tree.failed_with("read", path, source))?
            .map_err(Error::Write)?;
        if done.short {
            self.skip(
                path,
                "shrank while it was read: its end was filled with zeros",
            );
        }
        self.summary.bytes += done.bytes;
        self.summary.holes += size - done.bytes;
        archive::pad(out, done.bytes).map_err(Error::Write)?;
        Ok(digest.map(|digest| digest.finalize()))
    }

    /// Whether this is a symbolic link that under its first name was written with another target,
    /// which under another name leads elsewhere.
    fn is_shortened(&self, first: &[u8], node: &Node) -> Result<bool> {
        if !matches!(self.form, Form::Podman) || node.kind() != FileType::Symlink {
            return Ok(false);
        }
        Ok(clamped(&self.read_link(first, node)?, depth(first)).is_some())
    }

    fn read_link(&self, path: &[u8], node: &Node) -> Result<Vec<u8>> {
        rustix::fs::readlinkat(&node.fd, c"", Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(|e| self.tree.failed("read the link", path, e))
    }

    /// Where a symbolic link leads.
    ///
    /// Podman before 5.8.2 refuses a whole archive for one link that climbs above the root. `..` in
    /// the root is the root, so leading climbs that are too many can be left out.
    fn target(&mut self, path: &[u8], node: &Node) -> Result<Vec<u8>> {
        let target = self.read_link(path, node)?;
        let Form::Podman = self.form else {
            return Ok(target);
        };
        match clamped(&target, depth(path)) {
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
        let failed = |tree: &Tree, errno| tree.failed("read the attributes of", path, errno);
        let names = node.attribute_names().map_err(|e| failed(self.tree, e))?;
        let mut attributes = Vec::new();
        let mut size = 0;
        for name in names.into_iter().filter(|name| travels(name)) {
            let Some(value) = node.attribute(&name).map_err(|e| failed(self.tree, e))? else {
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

/// How many directories a path leads through.
pub(super) fn depth(path: &[u8]) -> usize {
    path.iter().filter(|byte| **byte == b'/').count()
}

/// A link's target without the leading `..` that climb out of a directory at that depth; `None` if
/// there is none to leave out.
pub(super) fn clamped(target: &[u8], depth: usize) -> Option<Vec<u8>> {
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
pub(super) fn times(stat: &Stat) -> (Moment, Moment) {
    let moment = |seconds: i64, nanoseconds: u64| Moment {
        seconds,
        nanoseconds: u32::try_from(nanoseconds).unwrap_or(0),
    };
    (
        moment(stat.st_mtime as i64, stat.st_mtime_nsec as u64),
        moment(stat.st_atime as i64, stat.st_atime_nsec as u64),
    )
}
