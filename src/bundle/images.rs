//! CRIU's images on their way: the files of one flat directory, one after the other.
//!
//! # Form
//! Each file is the length of its name (one byte), the name, its size (eight bytes, most significant
//! first), and that many bytes. A name of length zero is the end. CRIU's names are letters, digits,
//! `-`, `.` and `_` (`imgset_template` in CRIU's `criu/image-desc.c`); no other is accepted, so none leaves
//! the directory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use bytes::{BufMut, Bytes, BytesMut};
use futures::{Stream, stream};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{Error, Result};

/// Files are read and sent in pieces of this size: 256 KiB.
const PIECE: usize = 256 << 10;
/// A container with more processes and sockets than fit into so many files is refused.
const MOST_FILES: usize = 100_000;

/// The files of a directory, as a stream; but none of those that have been sent already, of which it adds
/// the others to the list.
///
/// # Errors
/// When the directory cannot be listed. The stream fails if a file cannot be read, or has a name that
/// CRIU gives none.
pub fn images(
    directory: &Path,
    sent: &mut BTreeSet<PathBuf>,
) -> Result<impl Stream<Item = Result<Bytes>> + Send + use<>> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(directory)
        .and_then(files)
        .map_err(Error::image("list", directory))?;
    names.retain(|name| sent.insert(name.clone()));
    names.sort_by(|one, other| other.cmp(one));
    let outgoing = Outgoing {
        names,
        open: None,
        ended: false,
    };
    Ok(stream::try_unfold(outgoing, |mut outgoing| async move {
        let piece = outgoing.next()?;
        Ok(piece.map(|piece| (piece, outgoing)))
    }))
}

/// The regular files: where there is an earlier round, a link leads to it.
fn files(entries: std::fs::ReadDir) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            files.push(entry.path());
        }
    }
    Ok(files)
}

/// Writes a stream's files into a directory, of which it makes sure that it stays below it.
///
/// Reads to the end of the images and no further. Returns how many bytes of content there were.
///
/// # Errors
/// [`Error::Images`] if it is not that; when a file cannot be written.
pub async fn write_images(from: &mut (impl AsyncRead + Unpin), directory: &Path) -> Result<u64> {
    let mut total = 0;
    for _ in 0..MOST_FILES {
        let length = from.read_u8().await.map_err(cut)?;
        if length == 0 {
            return Ok(total);
        }
        let mut name = vec![0; usize::from(length)];
        from.read_exact(&mut name).await.map_err(cut)?;
        let name = checked(&name)?;
        let size = from.read_u64().await.map_err(cut)?;
        let path = directory.join(name);
        let mut file = File::create_new(&path).map_err(Error::image("make", &path))?;
        let mut left = size;
        let mut piece = vec![0; PIECE.min(usize::try_from(size).unwrap_or(PIECE))];
        while left > 0 {
            let most = piece.len().min(usize::try_from(left).unwrap_or(PIECE));
            let got = from.read(&mut piece[..most]).await.map_err(cut)?;
            if got == 0 {
                return Err(Error::Images("it ends in the middle of a file".to_owned()));
            }
            // Memory, not a disk: this does not wait.
            file.write_all(&piece[..got])
                .map_err(Error::image("write", &path))?;
            left -= got as u64;
        }
        total += size;
    }
    Err(Error::Images(format!(
        "it has more than {MOST_FILES} files"
    )))
}

fn cut(error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Error::Images("it ends in the middle".to_owned()),
        _ => super::transfer::from_io(error),
    }
}

fn checked(name: &[u8]) -> Result<&str> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
    match std::str::from_utf8(name) {
        Ok(text) if name.iter().all(plain) && !text.starts_with('.') => Ok(text),
        _ => Err(Error::Images(format!(
            "no image of CRIU's has the name {:?}",
            String::from_utf8_lossy(name)
        ))),
    }
}

/// What is still to be sent.
struct Outgoing {
    /// Files that are not open yet, the next one last.
    names: Vec<PathBuf>,
    /// The one that is, and how much of it is left.
    open: Option<(File, PathBuf, u64)>,
    ended: bool,
}

impl Outgoing {
    fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some((mut file, path, left)) = self.open.take() {
            let most = PIECE.min(usize::try_from(left).unwrap_or(PIECE));
            let mut piece = vec![0; most];
            // Memory, not a disk: this does not wait.
            file.read_exact(&mut piece)
                .map_err(Error::image("read", &path))?;
            let left = left - most as u64;
            self.open = (left > 0).then_some((file, path, left));
            return Ok(Some(piece.into()));
        }
        let Some(path) = self.names.pop() else {
            let end = (!self.ended).then_some(Bytes::from_static(&[0]));
            self.ended = true;
            return Ok(end);
        };
        let file = File::open(&path).map_err(Error::image("open", &path))?;
        let size = file
            .metadata()
            .map_err(Error::image("look at", &path))?
            .len();
        let name = checked(path.file_name().unwrap_or_default().as_encoded_bytes())?;
        let mut head = BytesMut::with_capacity(1 + name.len() + 8);
        // A name has at most 255 bytes (`NAME_MAX` of Linux's `limits.h`).
        head.put_u8(u8::try_from(name.len()).unwrap_or(u8::MAX));
        head.put_slice(name.as_bytes());
        head.put_u64(size);
        self.open = (size > 0).then_some((file, path, size));
        Ok(Some(head.freeze()))
    }
}

#[cfg(test)]
mod tests {
    use futures::TryStreamExt;
    use proptest::prelude::*;

    use super::*;

    async fn carried(from: &Path, to: &Path, behind: &[u8]) -> Result<u64> {
        let pieces: Vec<Bytes> = images(from, &mut BTreeSet::new())?.try_collect().await?;
        let mut wire = pieces.concat();
        wire.extend_from_slice(behind);
        let mut reader = wire.as_slice();
        let bytes = write_images(&mut reader, to).await?;
        assert_eq!(reader, behind, "it reads no further than its end");
        Ok(bytes)
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.expect("a runtime").block_on(future)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn files_arrive_as_they_were(
            files in proptest::collection::btree_map("[a-z0-9]{1,20}\\.img", proptest::collection::vec(any::<u8>(), 0..2000), 0..8),
            behind: Vec<u8>,
        ) {
            let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
            for (name, content) in &files {
                std::fs::write(from.path().join(name), content).unwrap();
            }
            let bytes = block_on(carried(from.path(), to.path(), &behind)).unwrap();
            prop_assert_eq!(bytes as usize, files.values().map(Vec::len).sum::<usize>());
            for (name, content) in &files {
                prop_assert_eq!(&std::fs::read(to.path().join(name)).unwrap(), content);
            }
            prop_assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), files.len());
        }
    }

    #[test]
    fn what_was_sent_is_not_sent_again() {
        let from = tempfile::tempdir().unwrap();
        let mut sent = BTreeSet::new();
        for (name, length) in [("a.img", 1 + 5 + 8 + 1 + 1), ("b.img", 1 + 5 + 8 + 1 + 1)] {
            std::fs::write(from.path().join(name), b"x").unwrap();
            let pieces = images(from.path(), &mut sent).unwrap();
            let pieces: Vec<Bytes> = block_on(pieces.try_collect()).unwrap();
            assert_eq!(pieces.concat().len(), length, "{name}");
        }
    }

    #[test]
    fn a_file_larger_than_a_piece_arrives() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let content: Vec<u8> = (0..PIECE * 2 + 17).map(|i| i as u8).collect();
        std::fs::write(from.path().join("pages-1.img"), &content).unwrap();
        block_on(carried(from.path(), to.path(), b"")).unwrap();
        assert_eq!(
            std::fs::read(to.path().join("pages-1.img")).unwrap(),
            content
        );
    }

    #[test]
    fn names_that_are_not_criu_s_are_refused_and_write_nothing() {
        for name in ["../x", "/etc/x", "..", ".x", "a/b", "a\0b", "a b", "\u{e4}"] {
            let to = tempfile::tempdir().unwrap();
            let mut wire = vec![name.len() as u8];
            wire.extend_from_slice(name.as_bytes());
            wire.extend_from_slice(&3u64.to_be_bytes());
            wire.extend_from_slice(b"abc\0");
            let refused = block_on(write_images(&mut wire.as_slice(), to.path()));
            assert!(
                matches!(refused, Err(Error::Images(_))),
                "{name:?}: {refused:?}"
            );
            assert_eq!(std::fs::read_dir(to.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_stream_that_is_cut_or_names_a_file_twice_is_refused() {
        let file = |name: &str, content: &[u8]| {
            let mut wire = vec![name.len() as u8];
            wire.extend_from_slice(name.as_bytes());
            wire.extend_from_slice(&(content.len() as u64).to_be_bytes());
            wire.extend_from_slice(content);
            wire
        };
        let whole = [file("a.img", b"abc"), vec![0]].concat();
        for cut in 0..whole.len() {
            let to = tempfile::tempdir().unwrap();
            let refused = block_on(write_images(&mut &whole[..cut], to.path()));
            assert!(
                matches!(refused, Err(Error::Images(_))),
                "{cut}: {refused:?}"
            );
        }
        let to = tempfile::tempdir().unwrap();
        let twice = [file("a.img", b"abc"), file("a.img", b"abc"), vec![0]].concat();
        let refused = block_on(write_images(&mut twice.as_slice(), to.path()));
        assert!(
            matches!(refused, Err(Error::ImageFile { .. })),
            "{refused:?}"
        );
    }
}
