//! livemig's entries in front of Podman's archive, without a copy of either.
//!
//! A checkpoint that Podman exports is a tar archive, and its import takes from it whatever it
//! knows by name, in any order. So the archive that crosses is: an entry `rootfs-diff.tar`, an
//! entry `deleted.files`, and then Podman's own bytes unchanged, down to the empty blocks at its
//! end (but without what says that `/dev/shm` is empty). (Names: `RootFsDiffTar` and `DeletedFilesFile` of checkpoint-restore/checkpointctl, `lib/metadata.go`;
//! their use: `CRApplyRootFsDiffTar` and `CRRemoveDeletedFiles` of Podman, `pkg/checkpoint/crutils`.)
//!
//! Podman must have been told to leave the root file system out (`ignoreRootFS=true`): an entry of
//! the same name further back would replace livemig's, so it is refused.
//!
//! On its way Podman's archive is looked through for small entries that are worth knowing at the
//! source, such as CRIU's `stats-dump`, which is nowhere else once Podman has removed the container.

use std::collections::BTreeMap;
use std::io::{Read, Seek};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{Stream, StreamExt, TryStreamExt, stream};

use super::archive::{self, BLOCK, Head};
use super::transfer::until_error;
use super::walker::{self, Step, Walker};
use super::{DeltaFile, Error, Result};

/// The name under which Podman's import looks for an archive of changed files.
pub const ROOTFS_DIFF: &str = "rootfs-diff.tar";
/// The name under which Podman's import looks for the list of deleted files.
pub const DELETED_FILES: &str = "deleted.files";
/// The name of CRIU's statistics in Podman's archive.
pub const STATS_DUMP: &str = "stats-dump";

/// The name of what was in `/dev/shm` (`DevShmCheckpointTar` of checkpointctl).
const DEVSHM: &str = "devshm-checkpoint.tar";
/// It is the first or second entry of Podman's archive, and small if it holds nothing: it lies
/// within this many bytes from the beginning, or is left as it is.
const SHM_WITHIN: usize = 8 << 10;

/// The largest entry that is kept for a look: 64 KiB. CRIU's statistics are about 100 bytes.
pub const MAX_CAPTURE: usize = 64 << 10;

/// What is in front of the names of volumes in Podman's archive (`CheckpointVolumesDirectory` of
/// checkpointctl).
const VOLUMES: &[u8] = b"volumes";

/// The archive of changed files is passed on in pieces of this size: 1 MiB.
const CHUNK: usize = 1 << 20;

/// Small entries of an archive that went by.
#[derive(Debug, Clone, Default)]
pub struct Captured(Arc<Mutex<BTreeMap<String, Vec<u8>>>>);

impl Captured {
    /// The content of the entry of that name, if it has gone by completely and was small enough.
    pub fn get(&self, name: &str) -> Option<Vec<u8>> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(name)
            .cloned()
    }

    fn put(&self, name: String, content: Vec<u8>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(name, content);
    }
}

/// Puts the container's changed files in front of Podman's archive.
///
/// Pieces are at most 1 MiB where they are livemig's own; Podman's are passed on as they come.
///
/// # Errors
/// The stream fails if the archive of changed files is shorter than its length says, if Podman's
/// stream fails, or if it has a difference of the root file system of its own.
pub fn spliced<S, E>(
    delta: DeltaFile,
    podman: S,
    capture: &[&str],
) -> (impl Stream<Item = Result<Bytes>> + Send, Captured)
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: std::error::Error + Send + Sync + 'static,
{
    let podman = without_empty_shm(podman.map_err(|e| Error::Upstream(Box::new(e))));
    let (podman, captured) = watched(podman, capture);
    (until_error(front(delta).chain(podman)), captured)
}

/// The entries that are livemig's own. Nothing at all where nothing changed.
fn front(delta: DeltaFile) -> impl Stream<Item = Result<Bytes>> + Send {
    let DeltaFile {
        file,
        length,
        deleted,
        ..
    } = delta;
    let deleted = if deleted.is_empty() {
        Vec::new()
    } else {
        deleted_files(&deleted)
    };
    let head = (length > 0).then(|| Ok(header(ROOTFS_DIFF, length)));
    let tail = [
        Bytes::from(vec![0; archive::padding(length)]),
        if deleted.is_empty() {
            Bytes::new()
        } else {
            header(DELETED_FILES, deleted.len() as u64)
        },
        Bytes::from(vec![0; archive::padding(deleted.len() as u64)]),
    ];
    let [padding, list_head, list_padding] = tail;
    stream::iter(head)
        .chain(content(file, length))
        .chain(stream::iter(
            [padding, list_head, deleted.into(), list_padding].map(Ok),
        ))
        .try_filter(|piece| std::future::ready(!piece.is_empty()))
}

fn header(name: &str, size: u64) -> Bytes {
    let mut header = Vec::new();
    let head = Head {
        size,
        ..Head::empty(name.as_bytes())
    };
    // A `Vec` takes whatever is written to it.
    let _ = head.write(&mut header);
    header.into()
}

/// The list as Podman writes it: a JSON array of absolute paths, indented by two blanks.
fn deleted_files(paths: &[String]) -> Vec<u8> {
    // Strings always have a JSON form.
    serde_json::to_vec_pretty(paths).unwrap_or_default()
}

/// The first `length` bytes of a file, read beside the runtime's threads.
pub(super) fn content(
    file: std::fs::File,
    length: u64,
) -> impl Stream<Item = Result<Bytes>> + Send {
    stream::try_unfold((file, 0), move |(mut file, done)| async move {
        if done >= length {
            return Ok(None);
        }
        let (file, piece) = tokio::task::spawn_blocking(move || {
            if done == 0 {
                file.rewind()?;
            }
            let most = (length - done).min(CHUNK as u64);
            let mut piece = Vec::new();
            (&mut file).take(most).read_to_end(&mut piece)?;
            std::io::Result::Ok((file, piece))
        })
        .await
        .map_err(std::io::Error::other)
        .flatten()
        .map_err(|e| Error::Upstream(Box::new(e)))?;
        if piece.is_empty() {
            return Err(Error::ShortDelta {
                expected: length,
                got: done,
            });
        }
        let done = done + piece.len() as u64;
        Ok(Some((Bytes::from(piece), (file, done))))
    })
}

/// Leaves the entry for `/dev/shm` out where there is nothing in it.
///
/// Podman starts a process of its own to unpack it, while the container is nowhere, and does well
/// without it ("Container checkpoint doesn't contain dev/shm" in `libpod/container_internal_common.go`).
fn without_empty_shm<S>(podman: S) -> impl Stream<Item = Result<Bytes>> + Send
where
    S: Stream<Item = Result<Bytes>> + Send,
{
    // What is withheld, until it is long enough to tell; nothing once that is done.
    let withheld = Some(Vec::new());
    let podman = Box::pin(podman);
    stream::try_unfold(
        (podman, withheld),
        |(mut podman, mut withheld)| async move {
            loop {
                let next = podman.try_next().await?;
                let Some(head) = &mut withheld else {
                    return Ok(next.map(|piece| (piece, (podman, None))));
                };
                let over = next.is_none();
                head.extend_from_slice(&next.unwrap_or_default());
                if over || head.len() >= SHM_WITHIN {
                    if let Some(entry) = empty_shm(head) {
                        tracing::trace!("nothing in /dev/shm: its entry is left out");
                        head.drain(entry);
                    }
                    let head = Bytes::from(std::mem::take(head));
                    return Ok((!head.is_empty()).then_some((head, (podman, None))));
                }
            }
        },
    )
}

/// Where the entry for `/dev/shm` lies at the beginning of an archive, if that holds nothing but the
/// directory itself, as Podman makes it at the destination anyway.
fn empty_shm(archive: &[u8]) -> Option<std::ops::Range<usize>> {
    // Where POSIX (pax, "ustar Interchange Format") has name, mode, owner, group, size and type.
    let name = |header: &[u8]| {
        let end = header[..100].iter().position(|byte| *byte == 0);
        header[..end.unwrap_or(100)].to_vec()
    };
    let number = |header: &[u8], from: usize, to: usize| walker::octal(&header[from..to]);
    let mut begin = 0;
    loop {
        let header = archive.get(begin..begin + BLOCK)?;
        let size = usize::try_from(number(header, 124, 136)?).ok()?;
        let end = (begin + BLOCK).checked_add(size.checked_next_multiple_of(BLOCK)?)?;
        if name(header) != DEVSHM.as_bytes() {
            begin = end;
            continue;
        }
        let content = archive.get(begin + BLOCK..end)?;
        let (directory, rest) = content.split_at_checked(BLOCK)?;
        let plain = name(directory) == b"./"
            && directory[156] == b'5'
            && number(directory, 100, 108)? & 0o7777 == 0o1777
            && number(directory, 108, 116)? == 0
            && number(directory, 116, 124)? == 0
            // Nothing follows but the end of the archive.
            && rest.iter().all(|byte| *byte == 0);
        return plain.then_some(begin..end);
    }
}

/// Podman's archive of a container that still runs, without its volumes: what Podman reads of those while
/// they change may not even be an archive. They come last (`exportCheckpoint` in Podman's
/// `libpod/container_internal_common.go`), so the archive ends in front of them.
///
/// # Errors
/// The stream fails if Podman's does.
pub fn without_volumes<S, E>(podman: S) -> impl Stream<Item = Result<Bytes>> + Send
where
    S: Stream<Item = Result<Bytes, E>> + Send,
    E: std::error::Error + Send + Sync + 'static,
{
    let podman = without_empty_shm(podman.map_err(|e| Error::Upstream(Box::new(e))));
    let state = Some((Box::pin(podman), Blocks::default()));
    stream::try_unfold(state, |state| async move {
        let Some((mut podman, mut blocks)) = state else {
            return Ok(None);
        };
        Ok(match podman.try_next().await? {
            None => (!blocks.rest.is_empty()).then(|| (blocks.rest.into(), None)),
            Some(piece) => {
                let (piece, ended) = blocks.up_to_the_volumes(&piece);
                Some((piece, (!ended).then_some((podman, blocks))))
            }
        })
    })
}

/// An archive block by block.
#[derive(Debug, Default)]
struct Blocks {
    /// What is not a whole block yet.
    rest: Vec<u8>,
    /// How many bytes are left of the entry that goes by, filled up to whole blocks.
    entry: u64,
}

impl Blocks {
    /// The whole blocks that there are, and whether that is the end.
    fn up_to_the_volumes(&mut self, piece: &[u8]) -> (Bytes, bool) {
        self.rest.extend_from_slice(piece);
        let mut place = 0;
        while let Some(header) = self.rest.get(place..place + BLOCK) {
            if self.entry > 0 {
                let there = ((self.rest.len() - place) / BLOCK * BLOCK) as u64;
                let passing = self.entry.min(there);
                self.entry -= passing;
                // No more than there is in memory.
                place += passing as usize;
                continue;
            }
            if header.starts_with(VOLUMES) {
                let mut last = std::mem::take(&mut self.rest);
                last.truncate(place);
                // Two empty blocks end an archive.
                last.resize(place + 2 * BLOCK, 0);
                return (last.into(), true);
            }
            // What is no number is passed on, for somebody else to refuse.
            let size = walker::octal(&header[124..136]).unwrap_or(0);
            self.entry = size + archive::padding(size) as u64;
            place += BLOCK;
        }
        let rest = self.rest.split_off(place);
        (std::mem::replace(&mut self.rest, rest).into(), false)
    }
}

/// Passes Podman's archive on unchanged, keeping the small entries that were asked for.
///
/// Entries that are missing or larger than [`MAX_CAPTURE`] are not kept; an archive that cannot be
/// read is passed on all the same.
///
/// # Errors
/// The stream fails with [`Error::PodmanHasDelta`] where the archive has an entry that is
/// livemig's to write, before the bytes of that entry are passed on.
pub fn watched<S>(
    podman: S,
    capture: &[&str],
) -> (impl Stream<Item = Result<Bytes>> + Send, Captured)
where
    S: Stream<Item = Result<Bytes>> + Send,
{
    let captured = Captured::default();
    let mut watch = Watch {
        walker: Walker::default(),
        wanted: capture.iter().map(|name| (*name).to_owned()).collect(),
        open: None,
        captured: captured.clone(),
    };
    let stream = podman.map(move |piece| {
        let piece = piece?;
        watch.look(&piece)?;
        Ok(piece)
    });
    (stream, captured)
}

#[derive(Debug)]
struct Watch {
    walker: Walker,
    wanted: Vec<String>,
    /// The wanted entry that is going by: its name, its length and what there is of it.
    open: Option<(String, usize, Vec<u8>)>,
    captured: Captured,
}

impl Watch {
    fn look(&mut self, piece: &[u8]) -> Result<()> {
        let Watch {
            walker,
            wanted,
            open,
            captured,
        } = self;
        let mut refused = None;
        walker.feed(piece, |step| match step {
            Step::Entry(seen) => {
                *open = None;
                let name = String::from_utf8_lossy(&seen.name);
                let name = name.trim_start_matches("./").trim_start_matches('/');
                if [ROOTFS_DIFF, DELETED_FILES].contains(&name) {
                    refused = Some(name.to_owned());
                }
                let size = usize::try_from(seen.size).unwrap_or(usize::MAX);
                if size <= MAX_CAPTURE && wanted.iter().any(|wanted| wanted == name) {
                    if size == 0 {
                        captured.put(name.to_owned(), Vec::new());
                    } else {
                        *open = Some((name.to_owned(), size, Vec::new()));
                    }
                }
            }
            Step::Content(content) => {
                if let Some((name, size, kept)) = open {
                    kept.extend_from_slice(content);
                    if kept.len() == *size {
                        captured.put(std::mem::take(name), std::mem::take(kept));
                        *open = None;
                    }
                }
            }
        });
        refused.map_or(Ok(()), |name| Err(Error::PodmanHasDelta { name }))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    type Entry = (String, Vec<u8>);

    /// An archive as Go's writer would make it for these entries.
    fn archive_of(entries: &[Entry]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o600);
            builder
                .append_data(&mut header, name, &content[..])
                .expect("appended");
        }
        builder.into_inner().expect("finished")
    }

    fn entries_of(archive: &[u8]) -> Vec<Entry> {
        tar::Archive::new(archive)
            .entries()
            .expect("an archive")
            .map(|entry| {
                let mut entry = entry.expect("an entry");
                let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
                let mut content = Vec::new();
                entry.read_to_end(&mut content).expect("its content");
                (name, content)
            })
            .collect()
    }

    fn delta(content: &[u8], deleted: &[&str]) -> DeltaFile {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("written");
        DeltaFile {
            file,
            length: content.len() as u64,
            deleted: deleted.iter().map(|d| (*d).to_owned()).collect(),
            summary: crate::bundle::Summary::default(),
        }
    }

    /// Cuts into pieces whose lengths go round through `sizes`.
    fn cut(bytes: &[u8], sizes: &[usize]) -> Vec<Result<Bytes, std::io::Error>> {
        let mut pieces = Vec::new();
        let mut rest = bytes;
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (piece, left) = rest.split_at((*size).min(rest.len()));
            pieces.push(Ok(Bytes::copy_from_slice(piece)));
            rest = left;
        }
        pieces
    }

    fn run(
        delta: DeltaFile,
        pieces: Vec<Result<Bytes, std::io::Error>>,
        capture: &[&str],
    ) -> (Result<Vec<u8>>, Captured) {
        let (stream, captured) = spliced(delta, stream::iter(pieces), capture);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let whole = runtime.block_on(stream.map_ok(|b| b.to_vec()).try_concat());
        (whole, captured)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn the_result_is_an_archive_with_every_entry(
            entries in prop::collection::vec(
                ("[a-z]{1,8}(/[a-z]{1,40}){0,6}", prop::collection::vec(any::<u8>(), 0..3000)), 0..8),
            sizes in prop::collection::vec(1usize..2000, 1..5),
            content in prop::collection::vec(any::<u8>(), 0..5000),
            stats in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut entries: Vec<Entry> = entries;
            entries.push((STATS_DUMP.into(), stats.clone()));
            let podman = archive_of(&entries);
            let (whole, captured) =
                run(delta(&content, &["/etc/motd"]), cut(&podman, &sizes), &[STATS_DUMP]);
            let whole = whole.expect("no failure");
            prop_assert!(whole.ends_with(&podman));
            let mut expected = Vec::new();
            if !content.is_empty() {
                expected.push((ROOTFS_DIFF.to_owned(), content));
            }
            expected.push((DELETED_FILES.to_owned(), b"[\n  \"/etc/motd\"\n]".to_vec()));
            expected.extend(entries);
            prop_assert_eq!(entries_of(&whole), expected);
            prop_assert_eq!(captured.get(STATS_DUMP), Some(stats));
        }
    }

    #[test]
    fn nothing_changed_means_podmans_bytes_alone() {
        let podman = archive_of(&[("config.dump".into(), b"{}".to_vec())]);
        let (whole, _) = run(delta(b"", &[]), cut(&podman, &[700]), &[]);
        assert_eq!(whole.expect("no failure"), podman);
    }

    #[test]
    fn large_files_are_passed_on_in_bounded_pieces() {
        let content: Vec<u8> = (0..3_000_001u32).map(|n| n as u8).collect();
        let (stream, _) = spliced(
            delta(&content, &[]),
            stream::iter(cut(&archive_of(&[]), &[512])),
            &[],
        );
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        let pieces: Vec<Bytes> = runtime.block_on(stream.try_collect()).expect("no failure");
        assert!(pieces.iter().all(|p| p.len() <= CHUNK));
        assert_eq!(
            entries_of(&pieces.concat()),
            vec![(ROOTFS_DIFF.to_owned(), content)]
        );
    }

    #[test]
    fn a_large_entry_is_not_captured() {
        let podman = archive_of(&[(STATS_DUMP.into(), vec![1; MAX_CAPTURE + 1])]);
        let (whole, captured) = run(delta(b"", &[]), cut(&podman, &[4096]), &[STATS_DUMP]);
        assert_eq!(whole.expect("no failure"), podman);
        assert_eq!(captured.get(STATS_DUMP), None);
    }

    /// `/dev/shm` as Podman packs it: the directory, and perhaps a file.
    fn shm(mode: u32, file: bool) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.as_mut_bytes()[..2].copy_from_slice(b"./");
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(0);
        header.set_cksum();
        builder.append(&header, &[][..]).expect("appended");
        if file {
            header.set_entry_type(tar::EntryType::Regular);
            builder
                .append_data(&mut header, "queue", &[][..])
                .expect("appended");
        }
        builder.into_inner().expect("finished")
    }

    #[test]
    fn an_empty_shm_is_left_out_and_nothing_else() {
        let before = ("artifacts".to_owned(), Vec::new());
        let after = (STATS_DUMP.to_owned(), vec![3; 9000]);
        for (content, left_out) in [
            (shm(0o1777, false), true),
            (shm(0o1777, true), false),
            // Somebody has changed it.
            (shm(0o755, false), false),
            (vec![1; 1536], false),
        ] {
            for size in [100, 512, 5000, 100_000] {
                let entry = (DEVSHM.to_owned(), content.clone());
                let entries = [before.clone(), entry, after.clone()];
                let podman = archive_of(&entries);
                let (whole, _) = run(delta(b"", &[]), cut(&podman, &[size]), &[]);
                let expected: Vec<Entry> = entries
                    .into_iter()
                    .filter(|(name, _)| !left_out || name != DEVSHM)
                    .collect();
                assert_eq!(entries_of(&whole.expect("no failure")), expected);
            }
        }
    }

    #[test]
    fn podmans_own_difference_is_refused() {
        for name in [ROOTFS_DIFF, "./deleted.files"] {
            let podman = archive_of(&[(name.into(), vec![7; 900])]);
            let (whole, _) = run(delta(b"x", &[]), cut(&podman, &[512]), &[]);
            assert!(
                matches!(whole, Err(Error::PodmanHasDelta { .. })),
                "{name}: {whole:?}"
            );
        }
    }

    #[test]
    fn a_delta_that_shrank_is_an_error() {
        let mut short = delta(b"12345", &[]);
        short.length = 6;
        let (whole, _) = run(short, cut(&archive_of(&[]), &[512]), &[]);
        assert!(
            matches!(
                whole,
                Err(Error::ShortDelta {
                    expected: 6,
                    got: 5
                })
            ),
            "{whole:?}"
        );
    }

    #[test]
    fn podmans_failure_comes_through() {
        let mut pieces = cut(&archive_of(&[]), &[512]);
        pieces.push(Err(std::io::Error::other("socket closed")));
        let (whole, _) = run(delta(b"x", &[]), pieces, &[]);
        assert!(matches!(whole, Err(Error::Upstream(_))), "{whole:?}");
    }
}
