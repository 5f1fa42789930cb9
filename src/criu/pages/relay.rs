//! The page server that CRIU sends its pages to, at the source.

use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::writer::{Images, Keep};
use super::{Command, Layout, Memory, Reader, Seen};
use crate::criu::{Error, Result};

/// Pages are passed on in pieces of at most this many bytes: 1 MiB.
const PIECE: usize = 1 << 20;

/// What is known here of the rounds that the destination has.
///
/// Each leaves behind the lists of its pages, without the pages: of which memories there was one, CRIU asks
/// before it leaves out what did not change, and a CRIU that dumps lazily looks into them itself.
#[derive(Debug, Clone, Default)]
pub struct Lists {
    /// Where those of the round before are, if there was one.
    pub before: Option<PathBuf>,
    /// Where to leave those of this round, if there is another one.
    pub leave: Option<PathBuf>,
}

impl Lists {
    /// Whether there was this memory in the round before: a process may have begun since.
    fn has_parent(&self, memory: Memory) -> bool {
        let has = |directory: &Path| directory.join(memory.list()).exists();
        self.before.as_deref().is_some_and(has)
    }
}

/// Passes on what a CRIU sends, commands and pages as they come. `own_memory` is called as often as CRIU
/// begins with the memory of a process: in a round, by then it has let all of them go (`cr_pre_dump_finish` in
/// `criu/cr-dump.c`; what they share it sends before).
///
/// # Errors
/// The stream fails with [`Error::Relay`] if the connection breaks, with [`Error::Pages`] if it is not
/// CRIU that speaks, and with [`Error::Write`] if the lists cannot be left. It ends when CRIU says that that
/// was all.
pub fn pages<S, F>(
    criu: S,
    layout: Layout,
    lists: Lists,
    own_memory: F,
) -> impl Stream<Item = Result<Bytes>> + Send + use<S, F>
where
    S: AsyncRead + AsyncWrite + Unpin + Send,
    F: FnMut() + Send,
{
    let left = lists.leave.as_deref();
    let talk = Talk {
        stream: criu,
        left: left.map(|directory| Images::new(directory, Keep::Lists)),
        lists,
        own_memory,
        reader: Reader::new(layout),
        buffer: BytesMut::new(),
    };
    futures::stream::try_unfold(talk, |mut talk| async move {
        if talk.reader.ended {
            return Ok(None);
        }
        let piece = talk.piece().await?;
        Ok(Some((piece, talk)))
    })
}

/// Waits until a CRIU that will serve pages on this connection has come so far: when it answers a question,
/// all else has been dumped.
///
/// # Errors
/// [`Error::Relay`] if it has gone.
pub async fn answers<S>(criu: &mut S, layout: Layout) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    criu.write_all(&layout.has_parent())
        .await
        .map_err(Error::Relay)?;
    // An `int`.
    criu.read_u32().await.map_err(Error::Relay)?;
    Ok(())
}

/// CRIU, while it sends.
struct Talk<S, F> {
    stream: S,
    lists: Lists,
    own_memory: F,
    left: Option<Images>,
    reader: Reader,
    buffer: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin, F: FnMut()> Talk<S, F> {
    /// What has come since. CRIU gets the answers that it waits for.
    async fn piece(&mut self) -> Result<Bytes> {
        self.buffer.reserve(PIECE);
        let got = self.stream.read_buf(&mut self.buffer).await;
        if got.map_err(Error::Relay)? == 0 {
            return Err(Error::Relay(std::io::ErrorKind::UnexpectedEof.into()));
        }
        let piece = self.buffer.split().freeze();
        let mut answers = Vec::new();
        let Talk {
            lists,
            left,
            own_memory,
            ..
        } = self;
        self.reader.read(&piece, |seen| {
            if let Some(left) = left {
                left.take(&seen)?;
            }
            match seen {
                // A `char`.
                Seen::Command(Command::Open(memory)) => {
                    if matches!(memory, Memory::Process(_)) {
                        own_memory();
                    }
                    answers.push(u8::from(lists.has_parent(memory)));
                }
                // An `int`.
                Seen::Command(Command::HasParent(memory)) => {
                    answers.extend_from_slice(&u32::from(lists.has_parent(memory)).to_ne_bytes());
                }
                // An `int32_t`.
                Seen::Command(Command::Close) => answers.extend_from_slice(&0u32.to_ne_bytes()),
                Seen::Command(Command::Add(..)) | Seen::Pages(_) => {}
            }
            Ok(())
        })?;
        if self.reader.ended
            && let Some(left) = self.left.take()
        {
            left.finish()?;
        }
        self.stream
            .write_all(&answers)
            .await
            .map_err(Error::Relay)?;
        Ok(piece)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures::TryStreamExt;
    use tokio::io::DuplexStream;

    use super::super::tests::command;
    use super::*;

    const LAYOUT: Layout = Layout::Narrow;
    const OPEN: u32 = 4;
    const HAS_PARENT: u32 = 5;

    /// What CRIU is told when it says this of the process with this number.
    async fn told(criu: &mut DuplexStream, word: u32, process: u64, answer: &mut [u8]) {
        let memory = process << 8 | 1;
        criu.write_all(&command(LAYOUT, word, 0, 0, memory))
            .await
            .unwrap();
        criu.read_exact(answer).await.unwrap();
    }

    /// A round with one page of each of these processes. Returns of which CRIU was told that there is an
    /// earlier round of them.
    async fn round(lists: Lists, processes: &[u64]) -> Vec<u64> {
        let (mut criu, ours) = tokio::io::duplex(64 << 10);
        let relayed = pages(ours, LAYOUT, lists, || ()).try_collect::<Vec<Bytes>>();
        let speaks = async {
            let mut with_parent = Vec::new();
            for process in processes {
                let (mut asked, mut opened) = ([0; 4], [0; 1]);
                told(&mut criu, HAS_PARENT, *process, &mut asked).await;
                told(&mut criu, OPEN, *process, &mut opened).await;
                assert_eq!(u32::from_ne_bytes(asked), u32::from(opened[0]));
                if opened == [1] {
                    with_parent.push(*process);
                }
                let present = 6 | 4 << 16;
                criu.write_all(&command(LAYOUT, present, 1, 0x1000, process << 8 | 1))
                    .await
                    .unwrap();
                criu.write_all(&vec![7; super::super::page_size() as usize])
                    .await
                    .unwrap();
            }
            let mut end = [1; 4];
            told(&mut criu, 0x1024, 0, &mut end).await;
            assert_eq!(end, [0; 4]);
            with_parent
        };
        let (relayed, with_parent) = futures::join!(relayed, speaks);
        relayed.unwrap();
        with_parent
    }

    /// What is shared comes first, and while it does all processes stand still.
    #[tokio::test]
    async fn a_round_has_let_the_processes_go_when_their_own_memory_begins() {
        let own = AtomicUsize::new(0);
        let (mut criu, ours) = tokio::io::duplex(64 << 10);
        let relayed = pages(ours, LAYOUT, Lists::default(), || {
            own.fetch_add(1, Ordering::Relaxed);
        });
        let relayed = relayed.try_collect::<Vec<Bytes>>();
        let speaks = async {
            let seen = || own.load(Ordering::Relaxed);
            told(&mut criu, HAS_PARENT, 1, &mut [0; 4]).await;
            let shared = 7 << 8 | 2;
            criu.write_all(&command(LAYOUT, OPEN, 0, 0, shared))
                .await
                .unwrap();
            criu.read_exact(&mut [0; 1]).await.unwrap();
            assert_eq!(seen(), 0);
            for process in [1, 2] {
                told(&mut criu, OPEN, process, &mut [0; 1]).await;
                assert_eq!(seen() as u64, process);
            }
            told(&mut criu, 0x1024, 0, &mut [0; 4]).await;
        };
        let (relayed, ()) = futures::join!(relayed, speaks);
        relayed.unwrap();
    }

    #[tokio::test]
    async fn a_process_that_has_begun_since_has_no_earlier_round() {
        let directory = tempfile::tempdir().unwrap();
        let at = |number: u32| {
            let path = directory.path().join(number.to_string());
            std::fs::create_dir(&path).unwrap();
            path
        };
        let (first, second) = (at(1), at(2));
        let lists = |before: Option<&PathBuf>, leave: Option<&PathBuf>| Lists {
            before: before.cloned(),
            leave: leave.cloned(),
        };
        assert!(round(lists(None, Some(&first)), &[1, 2]).await.is_empty());
        // The second one has ended, the third has begun.
        let parents = round(lists(Some(&first), Some(&second)), &[1, 3]).await;
        assert_eq!(parents, [1]);
        // Only the round before counts: the images of each lead to those of the one before it.
        let parents = round(lists(Some(&second), None), &[1, 2, 3]).await;
        assert_eq!(parents, [1, 3]);
        // A CRIU that looks into the lists itself finds files of pages too, without the pages.
        let pages = std::fs::metadata(second.join("pages-65536.img")).unwrap();
        assert_eq!(pages.len(), 0);
        assert!(second.join("pagemap-3.img").is_file());
    }
}
