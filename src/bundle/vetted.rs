//! A look into an archive before Podman acts on it.
//!
//! Podman makes a container from what an imported archive says of it: which directories of the host
//! are mounted, which program is run when it ends, where its log is written. So the destination reads
//! the same documents as they go by, and what it has not agreed to never comes to its end: Podman acts
//! on an archive only when it has all of it.
//!
//! Two readers may see different archives in the same bytes. So everything is refused that is not
//! exactly what a Podman and livemig write: other names, other kinds of entries, a name twice, headers
//! that readers take differently.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{Stream, TryStreamExt, stream};

use super::splice::{DELETED_FILES, ROOTFS_DIFF, STATS_DUMP};
use super::walker::{Seen, Step, Walker};
use super::{Error, Result};

/// What Podman knows of the container: `ContainerConfig` in its `libpod/container_config.go`.
pub const CONFIG_DUMP: &str = "config.dump";
/// What the runtime is told: the OCI runtime specification's `config.json`.
pub const SPEC_DUMP: &str = "spec.dump";

/// Entries of Podman's archive that have no others below them (`lib/metadata.go` of checkpointctl).
const FILES: [&str; 10] = [
    CONFIG_DUMP,
    SPEC_DUMP,
    ROOTFS_DIFF,
    DELETED_FILES,
    STATS_DUMP,
    "network.status",
    "devshm-checkpoint.tar",
    "ctr.log",
    "dump.log",
    "bind.mounts",
];
/// And those that have.
const DIRECTORIES: [&str; 3] = ["artifacts", "checkpoint", "volumes"];

/// The largest document that is read, in bytes. A container's configuration takes some 25 KiB.
const LARGEST: u64 = 4 << 20;

/// The documents of an archive that say what Podman would do.
#[derive(Debug, Default)]
pub struct Documents(BTreeMap<&'static str, Vec<u8>>);

impl Documents {
    /// The content of one of them, if it is there.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.get(name).map(Vec::as_slice)
    }

    #[cfg(any(test, fuzzing))]
    pub(crate) fn of(all: &[(&'static str, &[u8])]) -> Documents {
        Documents(all.iter().map(|(n, c)| (*n, c.to_vec())).collect())
    }
}

/// Why an archive was refused, once it was.
#[derive(Debug, Clone, Default)]
pub struct Verdict(Arc<Mutex<Option<String>>>);

impl Verdict {
    /// What was wrong with it.
    pub fn reason(&self) -> Option<String> {
        let reason = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }
}

/// Passes an archive on, and its end only if it is what it should be and `judge` agrees.
///
/// # Errors
/// The stream fails with [`Error::Forbidden`] at the entry, or instead of the end; why is in the
/// verdict too, for whom the stream's own error does not reach.
pub fn vetted<S, J>(archive: S, judge: J) -> (impl Stream<Item = Result<Bytes>> + Send, Verdict)
where
    S: Stream<Item = Result<Bytes>> + Send,
    J: FnOnce(&Documents) -> Result<(), String> + Send,
{
    let verdict = Verdict::default();
    let state = (Box::pin(archive), Vetting::default(), Some(judge));
    let refused = verdict.clone();
    let stream = stream::try_unfold(state, move |(mut archive, mut vetting, judge)| {
        let refused = refused.clone();
        async move {
            let piece = archive.try_next().await?;
            let looked = match (&piece, judge) {
                (Some(piece), judge) => vetting.look(piece).map(|()| judge),
                (None, Some(judge)) => vetting.finish().and_then(judge).map(|()| None),
                (None, None) => Ok(None),
            };
            match looked {
                Ok(judge) => Ok(piece.map(|piece| (piece, (archive, vetting, judge)))),
                Err(what) => {
                    *refused.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(what.clone());
                    Err(Error::Forbidden { what })
                }
            }
        }
    });
    (stream, verdict)
}

#[derive(Debug)]
struct Vetting {
    walker: Walker,
    documents: Documents,
    /// The document that is going by, and its length.
    open: Option<(&'static str, u64)>,
    seen: std::collections::BTreeSet<&'static str>,
}

impl Default for Vetting {
    fn default() -> Self {
        Vetting {
            walker: Walker::strict(),
            documents: Documents::default(),
            open: None,
            seen: std::collections::BTreeSet::new(),
        }
    }
}

impl Vetting {
    fn look(&mut self, piece: &[u8]) -> Result<(), String> {
        let Vetting {
            walker,
            documents,
            open,
            seen,
        } = self;
        let mut wrong = None;
        walker.feed(piece, |step| match step {
            Step::Entry(entry) => match known(&entry) {
                Ok(Some(file)) if !seen.insert(file) => {
                    wrong.get_or_insert(format!("it has {file} twice"));
                }
                Ok(Some(file)) if [CONFIG_DUMP, SPEC_DUMP, DELETED_FILES].contains(&file) => {
                    if entry.size > LARGEST {
                        wrong.get_or_insert(format!("its {file} is larger than {LARGEST} bytes"));
                    }
                    documents.0.insert(file, Vec::new());
                    *open = Some((file, entry.size));
                }
                Ok(_) => *open = None,
                Err(what) => {
                    wrong.get_or_insert(what);
                }
            },
            Step::Content(content) => {
                if let Some((file, size)) = open
                    && *size <= LARGEST
                    && let Some(document) = documents.0.get_mut(file)
                {
                    document.extend_from_slice(content);
                }
            }
        });
        match (wrong, walker.fault()) {
            (Some(what), _) => Err(what),
            (None, Some(fault)) => Err(format!("it is no plain tar archive: {fault}")),
            (None, None) => Ok(()),
        }
    }

    fn finish(&mut self) -> Result<&Documents, String> {
        if !self.walker.has_ended() {
            return Err("it has no end".to_owned());
        }
        Ok(&self.documents)
    }
}

/// Which of the single files an entry is, if it is one, or what is wrong with it.
fn known(entry: &Seen) -> Result<Option<&'static str>, String> {
    let name = String::from_utf8_lossy(&entry.name);
    let strange = || format!("it has an entry `{}`", name.escape_debug());
    let regular = matches!(entry.flag, b'0' | 0);
    if let Some(file) = FILES.into_iter().find(|file| *file == name) {
        return if regular {
            Ok(Some(file))
        } else {
            Err(strange())
        };
    }
    let (directory, below) = name.split_once('/').ok_or_else(strange)?;
    let plain = !below.contains('/') && ![".", ".."].contains(&below);
    let fits = match below {
        "" => entry.flag == b'5',
        _ => regular,
    };
    if DIRECTORIES.contains(&directory) && plain && fits && !below.contains('\0') {
        Ok(None)
    } else {
        Err(strange())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry with a name that may be anything.
    fn entry(
        builder: &mut tar::Builder<Vec<u8>>,
        name: &str,
        kind: tar::EntryType,
        content: &[u8],
    ) {
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }

    fn archive(entries: &[(&str, tar::EntryType, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, content) in entries {
            entry(&mut builder, name, *kind, content);
        }
        builder.into_inner().unwrap()
    }

    /// What comes through, in pieces of this size, and the reason if not all does.
    fn pass(archive: &[u8], size: usize) -> (Vec<u8>, Option<String>) {
        let pieces: Vec<Result<Bytes>> = archive
            .chunks(size)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect();
        let (stream, verdict) = vetted(stream::iter(pieces), |documents| {
            match (documents.get(CONFIG_DUMP), documents.get(SPEC_DUMP)) {
                (Some(b"config"), Some(b"spec")) => Ok(()),
                other => Err(format!("{other:?}")),
            }
        });
        let mut stream = Box::pin(stream);
        let mut passed = Vec::new();
        let mut failed = false;
        futures::executor::block_on(async {
            loop {
                match stream.try_next().await {
                    Ok(Some(piece)) => passed.extend_from_slice(&piece),
                    Ok(None) => break,
                    Err(Error::Forbidden { .. }) => {
                        failed = true;
                        break;
                    }
                    Err(other) => panic!("{other}"),
                }
            }
        });
        assert_eq!(failed, verdict.reason().is_some());
        (passed, verdict.reason())
    }

    const FILE: tar::EntryType = tar::EntryType::Regular;

    fn good() -> Vec<(&'static str, tar::EntryType, &'static [u8])> {
        vec![
            ("artifacts/", tar::EntryType::Directory, b""),
            (CONFIG_DUMP, FILE, b"config"),
            (SPEC_DUMP, FILE, b"spec"),
            ("checkpoint/", tar::EntryType::Directory, b""),
            ("checkpoint/core-1.img", FILE, b"core"),
            ("volumes/data.tar", FILE, &[7; 3000]),
        ]
    }

    #[test]
    fn what_podman_writes_passes_unchanged() {
        let whole = archive(&good());
        for size in [1, 511, 512, 4096, 100_000] {
            assert_eq!(pass(&whole, size), (whole.clone(), None));
        }
    }

    #[test]
    fn tricks_are_refused() {
        let link = tar::EntryType::Symlink;
        for (name, kind) in [
            ("/etc/cron.d/x", FILE),
            ("../x", FILE),
            ("checkpoint/../config.json", FILE),
            ("checkpoint/..", FILE),
            ("./config.dump", FILE),
            ("config.json", FILE),
            ("checkpoint/a/b", FILE),
            ("checkpoint/link", link),
            ("checkpoint/hard", tar::EntryType::Link),
            ("checkpoint/node", tar::EntryType::Block),
            ("checkpoint/pipe", tar::EntryType::Fifo),
            ("checkpoint/sparse", tar::EntryType::GNUSparse),
            ("checkpoint", link),
            (ROOTFS_DIFF, link),
            (CONFIG_DUMP, FILE),
            ("", FILE),
        ] {
            let mut entries = good();
            entries.push((name, kind, b""));
            let whole = archive(&entries);
            let (passed, reason) = pass(&whole, 512);
            assert!(reason.is_some(), "{name}");
            assert!(passed.len() < whole.len(), "{name}");
        }
    }

    #[test]
    fn headers_that_readers_take_differently_are_refused() {
        for (flag, content) in [
            (b'L', &b"checkpoint/x\0"[..]),
            (b'K', b"x\0"),
            (b'g', b"20 path=config.dump\n"),
            (b'x', b"35 GNU.sparse.name=checkpoint/xxxx\n"),
        ] {
            let mut entries = good();
            entries.push(("checkpoint/x", tar::EntryType::new(flag), content));
            entries.push(("checkpoint/y", FILE, b""));
            let (_, reason) = pass(&archive(&entries), 512);
            let reason = reason.unwrap_or_else(|| panic!("{}", char::from(flag)));
            assert!(reason.contains("no plain tar archive"), "{reason}");
        }
        // A size that is one to Podman's reader and none to others, in front of what looks like an entry.
        let inner = archive(&[("checkpoint/y", FILE, b"")]);
        let mut whole = archive(&[("checkpoint/x", FILE, &inner)]);
        assert!(
            pass(&whole, 512)
                .1
                .is_some_and(|it| it.contains("Some") || it.contains("None"))
        );
        whole[124] = 0;
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes().copy_from_slice(&whole[..512]);
        header.set_cksum();
        whole[..512].copy_from_slice(header.as_bytes());
        let reason = pass(&whole, 512).1.expect("it is refused");
        assert!(reason.contains("no plain tar archive"), "{reason}");
        // One that names an entry is followed by that entry, not by another one.
        let mut entries = good();
        let record = b"21 path=checkpoint/x\n";
        for _ in 0..2 {
            entries.push(("pax", tar::EntryType::XHeader, record));
        }
        entries.push(("checkpoint/y", FILE, b""));
        assert!(pass(&archive(&entries), 512).1.is_some());
    }

    #[test]
    fn what_is_no_archive_or_has_no_end_is_refused() {
        let whole = archive(&good());
        // The last two blocks are the end.
        let (_, reason) = pass(&whole[..whole.len() - 1024], 512);
        assert_eq!(reason.as_deref(), Some("it has no end"));
        let mut gzip = whole.clone();
        gzip[..2].copy_from_slice(&[0x1f, 0x8b]);
        assert!(pass(&gzip, 4096).1.is_some());
        assert!(pass(b"", 1).1.is_some());
    }

    #[test]
    fn without_consent_the_end_does_not_come() {
        let mut entries = good();
        entries[1].2 = b"another";
        let whole = archive(&entries);
        let (passed, reason) = pass(&whole, 512);
        assert_eq!(passed, whole, "the end is what is missing");
        assert!(reason.unwrap().contains("Some"));
    }
}
