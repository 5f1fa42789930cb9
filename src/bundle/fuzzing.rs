//! Readers of what crosses with a container.

use std::fs;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

use super::apply::{Applier, Limits};
use super::changes::TreeId;
use super::walker::{Step, Walker, octal};
use super::{Error, Result, beheaded, receive, write_images};
use crate::agent::protocol::Flows;
use crate::fuzzing::{Trees, choice, pieces, read_flows, tar, wait_for};

/// No archive may write more than this here: there are many, and they are in memory.
const LARGEST: u64 = 16 << 20;

fn stream_of(input: &[u8], cut: u8) -> impl futures::Stream<Item = Result<Bytes>> + Send + use<> {
    let pieces: Vec<_> = pieces(input, cut)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .collect();
    stream::iter(pieces)
}

/// Frames, checksum and decompression ([`receive`]). What ends well has the checksum that it says.
pub fn transfer(input: &[u8]) {
    let (how, rest) = choice(input);
    let compressed = u32::from(how & 1) << 31;
    // Frames with a wrong trailer, around bytes of the decoder's own.
    let wire = if how & 2 == 0 {
        rest.to_vec()
    } else {
        let mut wire = Vec::new();
        for part in rest.chunks(1 + usize::from(how >> 4) * 64) {
            wire.extend((part.len() as u32 | compressed).to_be_bytes());
            wire.extend(part);
        }
        // The last frame and the trailer.
        wire.extend([0; 4 + 8 + 16]);
        wire
    };
    let (content, progress) = receive(stream_of(&wire, how >> 2), LARGEST);
    let mut content = Box::pin(content);
    let mut got = Vec::new();
    let ended = wait_for(async {
        while let Some(piece) = content.next().await {
            let Ok(piece) = piece else {
                return false;
            };
            got.extend_from_slice(&piece);
        }
        true
    });
    let bytes = got.len() as u64;
    assert!(bytes <= LARGEST, "a piece beyond the limit came through");
    let said = progress.checksum();
    assert_eq!(said.is_some(), ended);
    if let Some(said) = said {
        assert_eq!(said.bytes, bytes);
        assert_eq!(said.xxh3, twox_hash::XxHash3_128::oneshot(&got));
    }
}

/// What stands in front of a stream ([`beheaded`]). The rest comes through as it was.
pub fn header(input: &[u8]) {
    let (cut, rest) = choice(input);
    let read = wait_for(async {
        let (flows, rest): (Flows, _) = beheaded(stream_of(rest, cut)).await?;
        let behind: Vec<Bytes> = rest.try_collect().await?;
        Ok::<_, Error>((flows, behind.concat()))
    });
    if let Ok((flows, behind)) = read {
        assert!(rest.ends_with(&behind));
        read_flows(&flows);
    }
}

/// CRIU's images as files of a directory ([`write_images`]). Only in it, and all that is counted.
pub fn images(input: &[u8]) {
    let here = Trees::new();
    let before = here.outside();
    let directory = here.path().join("tree");
    for entry in fs::read_dir(&directory).expect("there") {
        let path = entry.expect("read").path();
        let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
    }
    let mut reader = input;
    let written = wait_for(write_images(&mut reader, &directory));
    assert_eq!(here.outside(), before);
    let mut bytes = 0;
    for entry in fs::read_dir(&directory).expect("there") {
        let about = entry.expect("read").metadata().expect("there");
        assert!(about.is_file());
        bytes += about.len();
    }
    if let Ok(written) = written {
        assert_eq!(written, bytes);
        assert!(input.ends_with(reader));
    }
}

/// Follows an archive ([`Walker`]), however it is cut.
pub fn walker(input: &[u8]) {
    let (how, archive) = choice(input);
    let repaired = tar::with_right_sums(archive, octal);
    let archive = if how & 1 == 0 { &repaired } else { archive };
    let new = || match (how >> 1) % 3 {
        0 => Walker::default(),
        1 => Walker::strict(),
        _ => Walker::own(),
    };
    let follow = |cut: u8| {
        let mut walker = new();
        let (mut entries, mut content) = (Vec::new(), Vec::new());
        for piece in pieces(archive, cut) {
            walker.feed(piece, |step| match step {
                Step::Entry(entry) => {
                    // Whatever it says.
                    let _ = entry.details();
                    entries.push((entry.name, entry.flag, entry.size));
                }
                Step::Content(piece) => content.extend_from_slice(piece),
            });
        }
        assert!(content.len() <= archive.len());
        (entries, content, walker.has_ended(), walker.fault())
    };
    assert_eq!(follow(0), follow(1 + (how >> 4) % 3));
}

/// What Podman is given of an archive ([`vetted`](mod@super::vetted)): the archive, and Podman
/// finds in it exactly the entries that were looked at.
pub fn vetted(input: &[u8]) {
    let (how, archive) = choice(input);
    let repaired = tar::with_right_sums(archive, octal);
    let archive = if how & 1 == 0 { &repaired } else { archive };
    let (passing, verdict) = super::vetted::vetted(stream_of(archive, how >> 1), |_| Ok(()));
    let passed: Result<Vec<Bytes>> = wait_for(passing.try_collect());
    match passed {
        Ok(passed) => {
            assert_eq!(verdict.reason(), None);
            assert_eq!(passed.concat(), archive, "it is not changed");
            let mut walker = Walker::strict();
            let mut seen = Vec::new();
            walker.feed(archive, |step| {
                if let Step::Entry(entry) = step {
                    seen.push((entry.name, entry.flag, entry.size));
                }
            });
            // Podman may refuse what passes. What it takes has to be what was looked at.
            if let Some(read) = tar::as_podman_reads(archive) {
                assert_eq!(seen, read, "Podman reads other entries");
            }
        }
        Err(_) => assert!(verdict.reason().is_some()),
    }
}

/// Changed files ([`Applier`]), brought into trees with links that lead out of them.
pub fn files(input: &[u8]) {
    let (how, archive) = choice(input);
    let repaired = tar::with_right_sums(archive, octal);
    let archive = if how & 1 == 0 { &repaired } else { archive };
    let here = Trees::new();
    let before = here.outside();
    let root = here.path().to_owned();
    let targets = move |tree: &TreeId| match tree {
        TreeId::Rootfs => Some(root.join("tree")),
        TreeId::Shm => Some(root.join("shm")),
        TreeId::Volume(name) => (name == "data").then(|| root.join("data")),
    };
    let limits = Limits {
        entries: 200,
        bytes: LARGEST,
        devices: false,
    };
    let mut applier = Applier::new(targets, limits);
    let fed = pieces(archive, how >> 1).try_for_each(|piece| applier.feed(piece));
    let applied = fed.and_then(|()| applier.finish());
    assert_eq!(here.outside(), before, "something outside was touched");
    if let Ok(applied) = applied {
        assert!(applied.entries + applied.removals <= limits.entries);
        assert!(applied.bytes <= archive.len() as u64);
    }
}
