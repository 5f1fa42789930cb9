//! What a container asks for of its memory when it runs already, on its way to the CRIU that serves it.
//!
//! A destination may want pages, and nothing else: CRIU's page server would also write what it is sent.
//!
//! # Pace
//! CRIU asks for the page that the container waits for, and as long as it waits for none, for the rest in
//! ever larger runs. What it is served it takes in the order of its requests, so that whoever waits for a page
//! waits for the run before it too. At the beginning that is most of the time that passes until the container
//! answers: so until it has been let go and has found what it needs, runs are cut short, and go on slowly.
//! (CRIU asks again for what it was not given, `uffd_io_complete` in `criu/uffd.c`.)

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{CLOSE, FORCE_CLOSE, Fields, Layout, MOST_PAGES};
use crate::criu::{Error, Result};

/// What a run is cut to: 16 pages, with which CRIU begins (`DEFAULT_XFER_LEN` in `criu/uffd.c`: 64 KiB).
const SHORT: u64 = 16;
/// How long a run waits for the request of a page to come after it.
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

/// Passes on the requests of a destination.
///
/// # Errors
/// The stream fails with [`Error::Relay`] if the connection breaks, and with [`Error::Pages`] if pages are not
/// what is asked for.
pub fn requests<S>(
    destination: S,
    layout: Layout,
    moments: FirstMoments,
) -> impl Stream<Item = Result<Bytes>> + Send
where
    S: AsyncRead + Unpin + Send,
{
    let wanted = Wanted {
        destination,
        layout,
        moments,
        buffer: BytesMut::new(),
    };
    futures::stream::try_unfold(wanted, |mut wanted| async move {
        Ok(wanted.next().await?.map(|request| (request, wanted)))
    })
}

/// A destination, while it asks.
struct Wanted<S> {
    destination: S,
    layout: Layout,
    moments: FirstMoments,
    buffer: BytesMut,
}

impl<S: AsyncRead + Unpin> Wanted<S> {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if !self.has_one().await? {
            return match self.buffer.is_empty() {
                true => Ok(None),
                false => Err(Error::Pages("a request is cut off")),
            };
        }
        let mut request = self.buffer.split_to(self.layout.length());
        match Request::read(&request, self.layout) {
            Some(Request::Pages(1)) => self.moments.asked(),
            Some(Request::Pages(pages)) if self.moments.go_on() => {
                let behind = tokio::time::timeout(PAUSE, self.has_one()).await;
                let most = match behind.unwrap_or(Ok(false))? {
                    true => 1,
                    false => SHORT,
                };
                let place = self.layout.pages();
                let fewer = pages.min(most).to_le_bytes();
                // As many bytes as there were for more.
                request[place.clone()].copy_from_slice(&fewer[..place.len()]);
            }
            Some(Request::Pages(_) | Request::End) => {}
            None => return Err(Error::Pages("something else than pages is asked for")),
        }
        Ok(Some(request.freeze()))
    }

    /// Waits for a request. Returns whether one came.
    async fn has_one(&mut self) -> Result<bool> {
        while self.buffer.len() < self.layout.length() {
            let got = self.destination.read_buf(&mut self.buffer).await;
            if got.map_err(Error::Relay)? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    /// So many pages.
    Pages(u64),
    /// That there are no more requests.
    End,
}

impl Request {
    /// Reads one; nothing if it is something else.
    fn read(request: &[u8], layout: Layout) -> Option<Request> {
        let Fields {
            word, flags, pages, ..
        } = Fields::read(request, layout)?;
        // `PS_IOV_GET` of `criu/page-xfer.c`. Requests have no flags.
        match word {
            7 if flags == 0 && (1..=MOST_PAGES).contains(&pages) => Some(Request::Pages(pages)),
            CLOSE | FORCE_CLOSE if flags == 0 => Some(Request::End),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{StreamExt, TryStreamExt};
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt;

    use super::super::tests::command;
    use super::*;

    const BOTH: [Layout; 2] = [Layout::Narrow, Layout::Wide];

    fn pages_of(request: &[u8], layout: Layout) -> Option<u64> {
        match Request::read(request, layout)? {
            Request::Pages(pages) => Some(pages),
            Request::End => None,
        }
    }

    fn get(layout: Layout, pages: u64) -> Vec<u8> {
        command(layout, 7, pages, 0x1000, 1 << 8 | 1)
    }

    /// What becomes of these requests, as numbers of pages, if they come all at once.
    async fn passed(layout: Layout, wanted: &[u64], moments: FirstMoments) -> Vec<u64> {
        let stream: Vec<u8> = wanted
            .iter()
            .flat_map(|pages| get(layout, *pages))
            .collect();
        let passed = requests(stream.as_slice(), layout, moments);
        let read = async |request: Bytes| Ok(pages_of(&request, layout).unwrap());
        passed.and_then(read).try_collect().await.unwrap()
    }

    #[tokio::test]
    async fn runs_are_short_until_the_container_has_found_its_way() {
        for layout in BOTH {
            // Behind the first run somebody waits, behind the second nobody.
            let passed_on = passed(layout, &[1, 1000, 1, 1000], FirstMoments::default()).await;
            assert_eq!(passed_on, [1, 1, 1, 16]);
        }
    }

    #[tokio::test]
    async fn runs_are_whole_when_no_page_has_been_asked_for_a_while() {
        let moments = FirstMoments::default();
        moments.begin();
        assert_eq!(passed(Layout::Wide, &[1], moments.clone()).await, [1]);
        let took = moments.took();
        assert!(took > Some(Duration::ZERO) && took < Some(QUIET));
        std::thread::sleep(2 * QUIET);
        let late = passed(Layout::Wide, &[1000, 1, 3], moments.clone());
        assert_eq!(late.await, [1000, 1, 3]);
        assert_eq!(moments.took(), took);
    }

    #[tokio::test]
    async fn a_page_does_not_wait_for_a_run_that_waits() {
        let layout = Layout::Wide;
        let (mut destination, ours) = tokio::io::duplex(1 << 10);
        let mut passed = std::pin::pin!(requests(ours, layout, FirstMoments::default()));
        destination.write_all(&get(layout, 500)).await.unwrap();
        // The run is looked at first.
        let asks = async { destination.write_all(&get(layout, 1)).await.unwrap() };
        let (run, ()) = futures::join!(passed.next(), asks);
        assert_eq!(pages_of(&run.unwrap().unwrap(), layout), Some(1));
        let page = passed.next().await.unwrap().unwrap();
        assert_eq!(pages_of(&page, layout), Some(1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_but_pages_can_be_asked_for(input in proptest::collection::vec(any::<u8>(), 0..200), word in prop_oneof![Just(6u32), Just(2), Just(4), Just(7 | 4 << 16), Just(0x1023)]) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            for layout in BOTH {
                let stream = [command(layout, word, 1, 0, 1 << 8 | 1), input.clone()].concat();
                let moments = FirstMoments::default();
                let passed: Vec<_> = runtime.block_on(requests(stream.as_slice(), layout, moments).collect());
                for request in passed.into_iter().flatten() {
                    prop_assert!(Request::read(&request, layout).is_some());
                    prop_assert_eq!(request.len(), layout.length());
                }
            }
        }
    }
}
