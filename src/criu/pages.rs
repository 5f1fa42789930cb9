//! Memory pages on their way out of CRIU, and into its images at the other end.
//!
//! CRIU can send the pages that it dumps to a *page server* instead of writing them to files. At the source
//! livemig is that server ([`relay`]), and passes on what it hears; at the destination it writes what the
//! page server would have written ([`writer`]). So a container's memory goes from its processes into the
//! destination's memory, and lies nowhere in between.
//!
//! # The protocol
//! (`struct page_server_iov` in `criu/page-xfer.c`.) Commands in the machine's byte order, here least
//! significant byte first: the command (16 bits) and its flags (16), a number of pages, an address (64),
//! and which memory it is part of (64: a type in the lowest 8, then a number). The number of pages has 32
//! bits, and from CRIU 4.2 on 64 ([`Layout`]). After an addition whose flags say that the pages are present
//! come the pages. CRIU waits for an answer after opening, after asking for a parent, and at the end; the
//! relay gives it, so none has to cross.
//!
//! With post-copy the memory stays where it is until it is wanted: all but what is needed first ([`first`]). See
//! [`fetch`], and [`wanted`] for the other end.

pub mod fetch;
pub mod first;
mod pagemap;
pub mod relay;
pub mod wanted;
pub mod writer;

use std::ops::Range;

use super::{Error, Result, Version};

/// The size of a page. (`PAGE_SIZE` of the architectures that CRIU runs on is 4 KiB in most kernels.)
pub(super) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// No run of pages that CRIU sends is longer, in pages: 1 TiB.
const MOST_PAGES: u64 = 1 << 28;

/// How commands are laid out, which the version of the CRIU that sends them says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Numbers of pages have 32 bits.
    Narrow,
    /// They have 64, and begin at a multiple of 8 bytes.
    Wide,
}

impl Layout {
    /// That of this version of CRIU.
    pub fn of(criu: Version) -> Layout {
        match criu < Version::new(4, 2) {
            true => Layout::Narrow,
            false => Layout::Wide,
        }
    }

    /// The question whether the memory of process 0, which there is none of, has a parent.
    fn has_parent(self) -> Vec<u8> {
        let nothing = Run {
            address: 0,
            pages: 0,
            flags: 0,
        };
        self.command(HAS_PARENT, OF_A_PROCESS, nothing)
    }

    /// The question for a run of pages of a process. In questions and answers, other than in what CRIU sends
    /// while it dumps, the number of the process is all that there is of the memory (`request_remote_pages`).
    fn get(self, process: u64, run: Run) -> Vec<u8> {
        self.command(GET, process, Run { flags: 0, ..run })
    }

    /// What goes before the pages in an answer to that.
    #[cfg(test)]
    fn add(self, process: u64, run: Run) -> Vec<u8> {
        self.command(ADD, process, run)
    }

    fn command(self, word: u16, memory: u64, run: Run) -> Vec<u8> {
        let mut command = vec![0; self.length()];
        command[..2].copy_from_slice(&word.to_le_bytes());
        // 16 bits.
        command[2..4].copy_from_slice(&(run.flags as u16).to_le_bytes());
        let place = self.pages();
        let pages = run.pages.to_le_bytes();
        command[place.clone()].copy_from_slice(&pages[..place.len()]);
        let end = self.length();
        command[end - 16..end - 8].copy_from_slice(&run.address.to_le_bytes());
        command[end - 8..].copy_from_slice(&memory.to_le_bytes());
        command
    }

    /// Where the number of pages is.
    fn pages(self) -> Range<usize> {
        match self {
            Layout::Narrow => 4..8,
            Layout::Wide => 8..16,
        }
    }

    /// How long a command is, in bytes.
    fn length(self) -> usize {
        match self {
            Layout::Narrow => 24,
            Layout::Wide => 32,
        }
    }
}

/// The parts of a command, as CRIU lays them out in either direction.
struct Fields {
    word: u16,
    flags: u16,
    pages: u64,
    address: u64,
    memory: u64,
}

impl Fields {
    fn read(command: &[u8], layout: Layout) -> Option<Fields> {
        let number = |at: Range<usize>| -> Option<u64> {
            let part = command.get(at)?.iter().rev();
            Some(part.fold(0, |number, byte| number << 8 | u64::from(*byte)))
        };
        let end = layout.length();
        Some(Fields {
            // 16 bits each.
            word: number(0..2)? as u16,
            flags: number(2..4)? as u16,
            pages: number(layout.pages())?,
            address: number(end - 16..end - 8)?,
            memory: number(end - 8..end)?,
        })
    }
}

/// `PS_IOV_OPEN2`, `PS_IOV_PARENT`, `PS_IOV_ADD_F` and `PS_IOV_GET`.
const OPEN: u16 = 4;
const HAS_PARENT: u16 = 5;
const ADD: u16 = 6;
const GET: u16 = 7;
/// `PS_TYPE_PID` and `PS_TYPE_SHMEM`.
const OF_A_PROCESS: u64 = 1;
const SHARED: u64 = 2;
/// `PS_IOV_CLOSE` and `PS_IOV_FORCE_CLOSE`.
const CLOSE: u16 = 0x1023;
const FORCE_CLOSE: u16 = 0x1024;

/// What a command says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Command {
    /// What follows is of this memory. CRIU waits to hear whether the memory has a parent.
    Open(Memory),
    /// Whether this memory has a parent.
    HasParent(Memory),
    /// A run of pages.
    Add(Memory, Run),
    /// That was all.
    Close,
}

/// Which memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Memory {
    /// Of the process with this number in its own namespace.
    Process(u64),
    /// Shared memory with this number.
    Shared(u64),
}

/// Pages one after the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    address: u64,
    pages: u64,
    flags: u32,
}

/// Something in a stream of pages.
enum Seen<'a> {
    Command(Command),
    /// A part of the pages of the last addition.
    Pages(&'a [u8]),
}

/// Reads a stream of pages, however it is cut.
#[derive(Debug)]
struct Reader {
    layout: Layout,
    /// A command of which a part has come.
    command: Vec<u8>,
    /// How many bytes of pages are still to come before the next command.
    left: u64,
    ended: bool,
}

impl Reader {
    fn new(layout: Layout) -> Reader {
        Reader {
            layout,
            command: Vec::new(),
            left: 0,
            ended: false,
        }
    }

    /// Shows what is in the next piece.
    fn read<'a>(
        &mut self,
        mut piece: &'a [u8],
        mut show: impl FnMut(Seen<'a>) -> Result<()>,
    ) -> Result<()> {
        while !piece.is_empty() {
            if self.left > 0 {
                let most = piece
                    .len()
                    .min(usize::try_from(self.left).unwrap_or(usize::MAX));
                let (pages, rest) = piece.split_at(most);
                show(Seen::Pages(pages))?;
                self.left -= most as u64;
                piece = rest;
                continue;
            }
            if self.ended {
                return Err(Error::Pages("something follows the end"));
            }
            let missing = self.layout.length() - self.command.len();
            let (part, rest) = piece.split_at(missing.min(piece.len()));
            self.command.extend_from_slice(part);
            piece = rest;
            if self.command.len() == self.layout.length() {
                let command = Command::read(&self.command, self.layout);
                let command = command.ok_or(Error::Pages("an unknown command"))?;
                self.command.clear();
                match command {
                    Command::Add(_, run) => self.left = run.content(),
                    Command::Close => self.ended = true,
                    Command::Open(_) | Command::HasParent(_) => {}
                }
                show(Seen::Command(command))?;
            }
        }
        Ok(())
    }
}

impl Run {
    /// `PE_PARENT` of `criu/include/pagemap.h`: the pages are as in the round before.
    const IN_PARENT: u32 = 1 << 0;
    /// `PE_LAZY`: they can be fetched later.
    const LAZY: u32 = 1 << 1;
    /// `PE_PRESENT`: the pages themselves follow.
    const PRESENT: u32 = 1 << 2;

    /// Whether the pages are still where the container was.
    fn is_elsewhere(self) -> bool {
        self.flags & (Run::IN_PARENT | Run::LAZY | Run::PRESENT) == Run::LAZY
    }

    /// How many bytes of pages follow.
    fn content(self) -> u64 {
        match self.flags & Run::PRESENT {
            0 => 0,
            _ => self.pages * page_size(),
        }
    }
}

impl Memory {
    fn read(number: u64) -> Option<Memory> {
        match number & 0xff {
            OF_A_PROCESS => Some(Memory::Process(number >> 8)),
            SHARED => Some(Memory::Shared(number >> 8)),
            _ => None,
        }
    }

    /// The name of the image that lists its pages (`imgset_template` in `criu/image-desc.c`).
    fn list(self) -> String {
        match self {
            Memory::Process(number) => format!("pagemap-{number}.img"),
            Memory::Shared(number) => format!("pagemap-shmem-{number}.img"),
        }
    }
}

impl Command {
    /// Reads one; nothing if it is none that CRIU sends while it dumps.
    fn read(bytes: &[u8], layout: Layout) -> Option<Command> {
        let Fields {
            word,
            flags,
            pages,
            address,
            memory,
        } = Fields::read(bytes, layout)?;
        let memory = Memory::read(memory);
        match word {
            OPEN => memory.map(Command::Open),
            HAS_PARENT => memory.map(Command::HasParent),
            ADD if pages <= MOST_PAGES => Some(Command::Add(
                memory?,
                Run {
                    address,
                    pages,
                    flags: flags.into(),
                },
            )),
            CLOSE | FORCE_CLOSE => Some(Command::Close),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream};

    use super::wanted::{Asking, Request};
    use super::*;

    /// The page at this address of every process.
    pub(super) fn page(address: u64) -> Vec<u8> {
        vec![(address / page_size() % 251) as u8; page_size() as usize]
    }

    /// A CRIU that has every page, until nobody asks any more. Returns what it was asked for: of which process,
    /// from which address on, how many pages.
    pub(super) async fn server(ours: DuplexStream, layout: Layout) -> Vec<(u64, u64, u64)> {
        let (asks, mut answers) = tokio::io::split(ours);
        let mut asking = Asking::new(asks, layout);
        let mut asked = Vec::new();
        while let Ok(Some((_, request))) = asking.next().await {
            let Request::Pages {
                process,
                address,
                pages,
            } = request
            else {
                answers.write_all(&[0; 4]).await.unwrap();
                break;
            };
            asked.push((process, address, pages));
            let present = Run {
                address,
                pages,
                flags: Run::PRESENT,
            };
            answers
                .write_all(&layout.add(process, present))
                .await
                .unwrap();
            for place in 0..pages {
                let page = page(address + place * page_size());
                answers.write_all(&page).await.unwrap();
            }
        }
        asked
    }

    /// As CRIU sends it.
    pub(super) fn command(
        layout: Layout,
        word: u32,
        pages: u64,
        address: u64,
        memory: u64,
    ) -> Vec<u8> {
        let mut bytes = word.to_le_bytes().to_vec();
        match layout {
            Layout::Narrow => bytes.extend((pages as u32).to_le_bytes()),
            // The compiler's gap in front of a number of 64 bits.
            Layout::Wide => bytes.extend([&[0xaa; 4][..], &pages.to_le_bytes()].concat()),
        }
        bytes.extend([address, memory].map(u64::to_le_bytes).concat());
        bytes
    }

    #[test]
    fn commands_are_read() {
        for layout in [Layout::Narrow, Layout::Wide] {
            let read = |word, pages, address, memory| {
                Command::read(&command(layout, word, pages, address, memory), layout)
            };
            let open = Command::Open(Memory::Process(7));
            assert_eq!(read(4, 0, 0, 7 << 8 | 1), Some(open));
            let run = Run {
                address: 0x7f00_1234_5000,
                pages: 3,
                flags: Run::PRESENT,
            };
            let add = Command::Add(Memory::Shared(9), run);
            assert_eq!(read(6 | 4 << 16, 3, run.address, 9 << 8 | 2), Some(add));
            assert_eq!(run.content(), 3 * page_size());
            assert_eq!(read(0x1023, 0, 0, 0), Some(Command::Close));
            // An unknown command, an unknown kind of memory, a run without an end.
            for (word, pages, memory) in [(7, 0, 1), (4, 0, 3), (6, u64::MAX, 1)] {
                assert_eq!(read(word, pages, 0, memory), None);
            }
        }
    }

    #[test]
    fn the_version_says_which_layout() {
        assert_eq!(Layout::of(Version::new(4, 1)), Layout::Narrow);
        assert_eq!(Layout::of(Version::new(4, 2)), Layout::Wide);
    }
}
