//! CRIU's memory images, written at the destination from what its page server was sent.
//!
//! For each memory there is a `pagemap` that lists runs of pages, and a `pages` file that has those that
//! are present, one after the other (`criu/page-xfer.c`, `images/pagemap.proto`).

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{Command, Layout, Memory, Reader, Run, Seen, pagemap};
use crate::criu::{Error, Result};

/// Where CRIU's page server begins to number its files of pages (`up_page_ids_base` in `criu/image.c`), so
/// that they are none of those that a dump writes itself.
const FIRST_FILE: u32 = 0x10000;
/// Whole pages are written, and many at a time, whichever way they come in: 256 KiB, which stays in a
/// processor's cache.
const WRITTEN_AT_ONCE: usize = 256 << 10;
/// A container with more processes and shared memories is refused.
const MOST_MEMORIES: usize = 100_000;
const NOT_OPEN: Error = Error::Pages("pages of a memory that is not open");

/// Writes the images of one stream of pages.
#[derive(Debug)]
pub struct PageWriter {
    reader: Reader,
    images: Images,
}

impl PageWriter {
    /// Writes into this directory what a CRIU sends that lays its commands out like this.
    pub fn new(directory: &Path, layout: Layout) -> PageWriter {
        PageWriter {
            reader: Reader::new(layout),
            images: Images::new(directory, Keep::Pages),
        }
    }

    /// Takes the next piece of the stream.
    ///
    /// # Errors
    /// [`Error::Pages`] if it is none of CRIU's; [`Error::Write`] if there is no room.
    pub fn feed(&mut self, piece: &[u8]) -> Result<()> {
        let PageWriter { reader, images } = self;
        reader.read(piece, |seen| images.take(&seen))
    }

    /// The stream has come to its end. Returns how many bytes of pages there were.
    ///
    /// # Errors
    /// [`Error::Pages`] if CRIU did not say that that was all; [`Error::Write`].
    pub fn finish(self) -> Result<u64> {
        if !self.reader.ended {
            return Err(Error::Pages("the stream ends before CRIU has ended it"));
        }
        self.images.finish()
    }
}

/// What of the images is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// All of them.
    Pages,
    /// Only which pages there are.
    Lists,
}

/// The images of all memories.
#[derive(Debug)]
pub(super) struct Images {
    directory: PathBuf,
    keep: Keep,
    /// Those that have come.
    memories: BTreeSet<Memory>,
    /// Whose pages come. CRIU's page server has one at a time as well: were the others left open, who
    /// sends could use up all files that this process may have open.
    current: Option<(Memory, Image)>,
    bytes: u64,
}

impl Images {
    pub(super) fn new(directory: &Path, keep: Keep) -> Images {
        Images {
            directory: directory.to_owned(),
            keep,
            memories: BTreeSet::new(),
            current: None,
            bytes: 0,
        }
    }

    /// Takes what comes next.
    pub(super) fn take(&mut self, seen: &Seen<'_>) -> Result<()> {
        match *seen {
            Seen::Command(Command::Open(memory)) => self.open(memory),
            Seen::Command(Command::Add(memory, run)) => self.add(memory, run),
            Seen::Pages(pages) if self.keep == Keep::Pages => self.write(pages),
            // Parents have been answered for at the source.
            Seen::Pages(_) | Seen::Command(Command::HasParent(_) | Command::Close) => Ok(()),
        }
    }

    fn add(&mut self, memory: Memory, run: Run) -> Result<()> {
        let failed = failed(&self.directory, "the list of pages");
        match &mut self.current {
            Some((current, image)) if *current == memory => {
                pagemap::add(&mut image.list, run).map_err(failed)
            }
            _ => Err(NOT_OPEN),
        }
    }

    fn write(&mut self, pages: &[u8]) -> Result<()> {
        let failed = failed(&self.directory, "the container's pages");
        self.bytes += pages.len() as u64;
        let (_, image) = self.current.as_mut().ok_or(NOT_OPEN)?;
        image.pages.write_all(pages).map_err(failed)
    }

    fn open(&mut self, memory: Memory) -> Result<()> {
        self.close()?;
        // Fewer than there are numbers.
        let number = FIRST_FILE + self.memories.len() as u32;
        if self.memories.len() >= MOST_MEMORIES || !self.memories.insert(memory) {
            return Err(Error::Pages("too many memories, or one that comes twice"));
        }
        let make = |name: String| {
            let path = self.directory.join(name);
            File::create_new(&path).map_err(|source| Error::Write {
                value: "one of CRIU's images",
                path,
                source,
            })
        };
        let mut image = Image {
            list: BufWriter::new(make(memory.list())?),
            pages: BufWriter::with_capacity(WRITTEN_AT_ONCE, make(format!("pages-{number}.img"))?),
        };
        let failed = failed(&self.directory, "the list of pages");
        pagemap::begin(&mut image.list, number).map_err(failed)?;
        self.current = Some((memory, image));
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        let Some((_, mut image)) = self.current.take() else {
            return Ok(());
        };
        image
            .list
            .flush()
            .map_err(failed(&self.directory, "the list of pages"))?;
        let failed = failed(&self.directory, "the container's pages");
        image.pages.flush().map_err(failed)
    }

    pub(super) fn finish(mut self) -> Result<u64> {
        self.close()?;
        Ok(self.bytes)
    }
}

fn failed(directory: &Path, value: &'static str) -> impl FnOnce(std::io::Error) -> Error + use<> {
    let path = directory.to_owned();
    move |source| Error::Write {
        value,
        path,
        source,
    }
}

/// The two files of one memory.
#[derive(Debug)]
struct Image {
    list: BufWriter<File>,
    pages: BufWriter<File>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::page_size;
    use super::super::tests::command as laid_out;
    use super::*;

    const PROCESS: u64 = 1 << 8 | 1;
    const PRESENT: u32 = 6 | Run::PRESENT << 16;

    fn command(word: u32, pages: u64, address: u64, memory: u64) -> Vec<u8> {
        laid_out(Layout::Wide, word, pages, address, memory)
    }

    fn written(stream: &[u8], cut: usize) -> Result<(tempfile::TempDir, u64)> {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = PageWriter::new(directory.path(), Layout::Wide);
        for piece in stream.chunks(cut.max(1)) {
            writer.feed(piece)?;
        }
        let bytes = writer.finish()?;
        Ok((directory, bytes))
    }

    fn close() -> Vec<u8> {
        command(0x1023, 0, 0, 0)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn pages_are_written_however_the_stream_is_cut(runs in proptest::collection::vec((1u64..4, any::<bool>()), 0..6), cut in 1usize..9000) {
            let mut stream = command(4, 0, 0, PROCESS);
            let mut content = Vec::new();
            for (place, (pages, present)) in runs.iter().enumerate() {
                let word = if *present { PRESENT } else { 6 | 1 << 16 };
                stream.extend(command(word, *pages, place as u64 * 0x10_0000, PROCESS));
                if *present {
                    let bytes = vec![place as u8 + 1; *pages as usize * page_size() as usize];
                    stream.extend(&bytes);
                    content.extend(bytes);
                }
            }
            stream.extend(close());
            let (directory, bytes) = written(&stream, cut).unwrap();
            prop_assert_eq!(bytes, content.len() as u64);
            prop_assert_eq!(std::fs::read(directory.path().join("pages-65536.img")).unwrap(), content);
            let pagemap = std::fs::read(directory.path().join("pagemap-1.img")).unwrap();
            let (number, listed) = pagemap::read(&pagemap).unwrap();
            prop_assert_eq!(number, 65536);
            let listed: Vec<u64> = listed.iter().map(|run| run.pages).collect();
            prop_assert_eq!(listed, runs.iter().map(|(pages, _)| *pages).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_no_stream_of_criu_s_is_refused() {
        let open = command(4, 0, 0, PROCESS);
        let add = command(PRESENT, 1, 0, PROCESS);
        let other = command(4, 0, 0, PROCESS + (1 << 8));
        let cases: [(&str, Vec<u8>); 7] = [
            ("no end", open.clone()),
            ("cut in a command", [&open[..], &open[..3]].concat()),
            ("pages missing", [&open[..], &add, &close()].concat()),
            ("a memory that is not open", [&add[..], &close()].concat()),
            (
                "a memory that was open before",
                [&open[..], &other, &add, &close()].concat(),
            ),
            ("opened twice", [&open[..], &open, &close()].concat()),
            ("more behind the end", [&close()[..], &open].concat()),
        ];
        for (what, stream) in cases {
            let refused = written(&stream, 1000);
            assert!(
                matches!(refused, Err(Error::Pages(_))),
                "{what}: {refused:?}"
            );
        }
    }

    #[test]
    fn memories_that_have_come_take_no_open_files() {
        let directory = tempfile::tempdir().unwrap();
        let mut writer = PageWriter::new(directory.path(), Layout::Wide);
        for process in 1..=2000 {
            writer.feed(&command(4, 0, 0, process << 8 | 1)).unwrap();
        }
        let here = directory.path().to_str().unwrap();
        let open = std::fs::read_dir("/proc/self/fd").unwrap().filter(|entry| {
            let to = std::fs::read_link(entry.as_ref().unwrap().path());
            to.is_ok_and(|to| to.starts_with(here))
        });
        assert_eq!(open.count(), 2);
        writer.feed(&close()).unwrap();
        assert_eq!(writer.finish().unwrap(), 0);
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            2 * 2000
        );
    }
}
