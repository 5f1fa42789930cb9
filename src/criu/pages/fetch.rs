//! A container's memory on its way to the CRIU that gives it to the container, at the destination, with
//! post-copy. What it touches first has come with its images ([`first`](super::first)).
//!
//! # Pace
//! CRIU asks for the page that the container waits for, and as long as it waits for none, for the rest in
//! ever larger runs. What it is served it takes in the order of its requests, so that whoever waits for a page
//! waits for the run before it too. At the beginning that is most of the time that passes until the container
//! answers: so until it has been let go and has found what it needs, runs go on slowly, which keeps them short,
//! too. They are given whole: who waits for a page of a run that is on its way is forgotten if the page is not in
//! it (`is_page_queued` and `uffd_io_complete` in `criu/uffd.c`).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, copy_buf};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::wanted::{Asking, Request};
use super::{ADD, Fields, Layout, MOST_PAGES, Run};
use crate::criu::{Error, Result};

/// How long a run waits, unless something comes after it. (It is a few dozen pages long at the beginning, see
/// `update_xfer_len` in `criu/uffd.c`.)
const PAUSE: Duration = Duration::from_millis(2);
/// How long no page is asked for when the container has found what it needs at first.
const QUIET: Duration = Duration::from_millis(10);
/// A container that goes on asking gets the rest of its memory at full speed after this all the same.
const LONGEST: Duration = Duration::from_millis(250);

/// The container's first moments: from when it was let go until it had found what it needs at first.
#[derive(Debug, Clone, Default)]
pub struct FirstMoments(Arc<Moments>);

#[derive(Debug, Default)]
struct Moments {
    began: OnceLock<Instant>,
    /// How long after that the last of these pages was asked for, in nanoseconds.
    last: AtomicU64,
}

impl FirstMoments {
    /// The container is let go now.
    pub fn begin(&self) {
        // Only the first time counts.
        let _ = self.0.began.set(Instant::now());
    }

    /// How long they were; none if the container went on asking, so that nobody can tell from outside what
    /// was for its answers and what for other work.
    pub fn took(&self) -> Option<Duration> {
        let took = self.so_far();
        (took + QUIET <= LONGEST).then_some(took)
    }

    fn so_far(&self) -> Duration {
        Duration::from_nanos(self.0.last.load(Ordering::Relaxed))
    }

    /// Whether they are not over.
    fn go_on(&self) -> bool {
        let began = self.0.began.get();
        began.is_none_or(|began| began.elapsed() < LONGEST.min(self.so_far() + QUIET))
    }

    /// The container waits for a page.
    fn asked(&self) {
        if let (Some(began), true) = (self.0.began.get(), self.go_on()) {
            // Less than a second.
            let since = began.elapsed().as_nanos() as u64;
            self.0.last.store(since, Ordering::Relaxed);
        }
    }
}

/// Gives a CRIU the pages that it asks for, from a source: what is written to `asks` is what it is asked for, and
/// what is read from `pages` are its answers.
///
/// # Errors
/// [`Error::Relay`] if a connection breaks, and [`Error::Pages`] if something else than pages is asked for, or
/// comes.
pub async fn fetch(
    criu: (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    asks: impl AsyncWrite + Unpin,
    pages: impl AsyncBufRead + Unpin,
    layout: Layout,
    moments: &FirstMoments,
) -> Result<()> {
    // How many answers CRIU waits for is for itself to say.
    let (owes, owed) = unbounded_channel();
    let ask = pass_on(Asking::new(criu.0, layout), asks, owes, moments);
    futures::try_join!(ask, answer(pages, criu.1, owed, layout))?;
    Ok(())
}

/// What a CRIU is to be given next.
enum Owed {
    /// What the source answers next.
    Pages,
    /// All that it still says.
    Rest,
}

/// Passes on what a CRIU asks for.
async fn pass_on(
    mut asking: Asking<impl AsyncRead + Unpin>,
    mut asks: impl AsyncWrite + Unpin,
    owes: UnboundedSender<Owed>,
    moments: &FirstMoments,
) -> Result<()> {
    while let Some((bytes, request)) = asking.next().await? {
        let owed = match request {
            Request::Pages { pages: 1, .. } => {
                moments.asked();
                Owed::Pages
            }
            Request::Pages { .. } => {
                if moments.go_on() {
                    let behind = tokio::time::timeout(PAUSE, asking.has_one()).await;
                    behind.unwrap_or(Ok(false))?;
                }
                Owed::Pages
            }
            Request::End => Owed::Rest,
        };
        asks.write_all(&bytes).await.map_err(Error::Relay)?;
        if owes.send(owed).is_err() {
            break;
        }
    }
    Ok(())
}

/// Gives a CRIU what it is owed, in the order in which it has asked.
async fn answer(
    mut pages: impl AsyncBufRead + Unpin,
    mut criu: impl AsyncWrite + Unpin,
    mut owed: UnboundedReceiver<Owed>,
    layout: Layout,
) -> Result<()> {
    while let Some(owed) = owed.recv().await {
        match owed {
            Owed::Pages => {
                let (head, run) = answered(&mut pages, layout).await?;
                criu.write_all(&head).await.map_err(Error::Relay)?;
                let mut content = (&mut pages).take(run.content());
                let copied = copy_buf(&mut content, &mut criu).await;
                if copied.map_err(Error::Relay)? < run.content() {
                    return Err(CUT_OFF);
                }
            }
            Owed::Rest => {
                copy(&mut pages, &mut criu).await.map_err(Error::Relay)?;
            }
        }
    }
    Ok(())
}

const CUT_OFF: Error = Error::Pages("an answer is cut off");

/// The head of an answer, and which pages follow it.
pub(super) async fn answered(
    pages: &mut (impl AsyncRead + Unpin),
    layout: Layout,
) -> Result<(Vec<u8>, Run)> {
    let mut head = vec![0; layout.length()];
    pages.read_exact(&mut head).await.map_err(Error::Relay)?;
    match Fields::read(&head, layout) {
        Some(fields) if fields.word == ADD && fields.pages <= MOST_PAGES => {
            let run = Run {
                address: fields.address,
                pages: fields.pages,
                flags: fields.flags.into(),
            };
            Ok((head, run))
        }
        _ => Err(Error::Pages("something else than pages is answered")),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{BufReader, DuplexStream, duplex, split};

    use super::super::page_size;
    use super::super::tests::{page as right, server};
    use super::*;

    const PROCESS: u64 = 3;
    const BOTH: [Layout; 2] = [Layout::Narrow, Layout::Wide];

    fn run(address: u64, pages: u64) -> Run {
        Run {
            address,
            pages,
            flags: 0,
        }
    }

    /// A CRIU that asks for these runs at once and then says that that was all. Returns how many pages it was
    /// given of each.
    async fn criu(mut ours: DuplexStream, layout: Layout, wanted: &[(u64, u64)]) -> Vec<u64> {
        let mut requests = Vec::new();
        for (address, pages) in wanted {
            requests.extend(layout.get(PROCESS, run(*address, *pages)));
        }
        ours.write_all(&requests).await.unwrap();
        let mut given = Vec::new();
        for (address, _) in wanted {
            let (_, got) = answered(&mut ours, layout).await.unwrap();
            assert_eq!(got.address, *address);
            for place in 0..got.pages {
                let mut page = vec![0; page_size() as usize];
                ours.read_exact(&mut page).await.unwrap();
                assert!(page == right(address + place * page_size()));
            }
            given.push(got.pages);
        }
        let end = [0x23, 0x10].into_iter().chain([0; 30]);
        let end: Vec<u8> = end.take(layout.length()).collect();
        ours.write_all(&end).await.unwrap();
        ours.read_exact(&mut [0; 4]).await.unwrap();
        given
    }

    /// What a CRIU is given of these runs, and what the source is asked for.
    async fn fetched(
        layout: Layout,
        wanted: &[(u64, u64)],
        moments: &FirstMoments,
    ) -> (Vec<u64>, Vec<(u64, u64, u64)>) {
        let (asks, here) = duplex(1 << 20);
        let (there, serves) = duplex(1 << 20);
        let (pages, requests) = split(there);
        let pages = BufReader::new(pages);
        let fetching = fetch(split(here), requests, pages, layout, moments);
        let (asked, given, fetched) =
            futures::join!(server(serves, layout), criu(asks, layout, wanted), fetching);
        fetched.unwrap();
        (given, asked)
    }

    #[tokio::test]
    async fn what_is_asked_for_is_given_whole_and_in_order() {
        let page = page_size();
        for layout in BOTH {
            let wanted = [(0, 90), (100 * page, 1), (200 * page, 3)];
            let (given, asked) = fetched(layout, &wanted, &FirstMoments::default()).await;
            assert_eq!(given, [90, 1, 3]);
            assert_eq!(
                asked,
                wanted.map(|(address, pages)| (PROCESS, address, pages))
            );
        }
    }

    #[tokio::test]
    async fn runs_go_on_slowly_until_the_container_has_found_its_way() {
        let page = page_size();
        let layout = Layout::Wide;
        // Behind these runs nobody waits: the answer to a page says that nothing more is asked for.
        let mut waited = Duration::ZERO;
        for _ in 0..3 {
            let began = Instant::now();
            let (criu, ours) = duplex(1 << 20);
            let (there, serves) = duplex(1 << 20);
            let (pages, asks) = split(there);
            let moments = FirstMoments::default();
            let pages = BufReader::new(pages);
            let fetching = fetch(split(ours), asks, pages, layout, &moments);
            let asks_once = async {
                let mut criu = criu;
                let request = layout.get(PROCESS, run(page, 90));
                criu.write_all(&request).await.unwrap();
                answered(&mut criu, layout).await.unwrap().1.pages
            };
            let given = tokio::select! {
                given = asks_once => given,
                _ = fetching => panic!("it ends"),
                _ = server(serves, layout) => panic!("the source ends"),
            };
            assert_eq!(given, 90);
            waited += began.elapsed();
        }
        assert!(waited >= 3 * PAUSE, "{waited:?}");
    }

    #[tokio::test]
    async fn its_first_moments_are_as_long_as_it_asks_for_pages() {
        let moments = FirstMoments::default();
        moments.begin();
        fetched(Layout::Wide, &[(0, 1)], &moments).await;
        let took = moments.took();
        assert!(took > Some(Duration::ZERO) && took < Some(QUIET));
        std::thread::sleep(2 * QUIET);
        fetched(Layout::Wide, &[(0, 1)], &moments).await;
        assert_eq!(moments.took(), took);
    }

    #[tokio::test]
    async fn something_else_than_pages_is_not_taken_for_an_answer() {
        let layout = Layout::Wide;
        let present = Run {
            flags: Run::PRESENT,
            ..run(0, 3)
        };
        let cases = [
            ("no answer", layout.get(PROCESS, run(0, 1))),
            ("a head alone", layout.add(PROCESS, present)),
            ("a part of one", layout.add(PROCESS, present)[..9].to_vec()),
        ];
        for (what, answer) in cases {
            let (mut criu, ours) = duplex(1 << 10);
            let request = layout.get(PROCESS, run(0, 3));
            criu.write_all(&request).await.unwrap();
            let (moments, asks) = (FirstMoments::default(), tokio::io::sink());
            let fetched = fetch(split(ours), asks, &answer[..], layout, &moments);
            assert!(fetched.await.is_err(), "{what}");
        }
    }
}
