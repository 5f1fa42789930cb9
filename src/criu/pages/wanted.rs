//! What a destination asks for of a container's memory, on its way to the CRIU that serves it, at the source.
//!
//! A destination may want pages, and nothing else: CRIU's page server would also write what it is sent.

use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::{CLOSE, FORCE_CLOSE, Fields, GET, Layout, MOST_PAGES};
use crate::criu::{Error, Result};

/// Passes on the requests of a destination.
///
/// # Errors
/// The stream fails with [`Error::Relay`] if the connection breaks, and with [`Error::Pages`] if pages are not
/// what is asked for.
pub fn requests<S>(asks: S, layout: Layout) -> impl Stream<Item = Result<Bytes>> + Send
where
    S: AsyncRead + Unpin + Send,
{
    futures::stream::try_unfold(Asking::new(asks, layout), |mut asking| async move {
        Ok(asking.next().await?.map(|(bytes, _)| (bytes, asking)))
    })
}

/// Somebody, while he asks.
pub(super) struct Asking<S> {
    asks: S,
    layout: Layout,
    buffer: BytesMut,
}

impl<S: AsyncRead + Unpin> Asking<S> {
    pub fn new(asks: S, layout: Layout) -> Asking<S> {
        Asking {
            asks,
            layout,
            buffer: BytesMut::new(),
        }
    }

    /// The next request, as it came and what it says.
    pub async fn next(&mut self) -> Result<Option<(Bytes, Request)>> {
        if !self.has_one().await? {
            return match self.buffer.is_empty() {
                true => Ok(None),
                false => Err(Error::Pages("a request is cut off")),
            };
        }
        let bytes = self.buffer.split_to(self.layout.length()).freeze();
        let request = Request::read(&bytes, self.layout);
        let request = request.ok_or(Error::Pages("something else than pages is asked for"))?;
        Ok(Some((bytes, request)))
    }

    /// Waits for a request. Returns whether one came.
    pub async fn has_one(&mut self) -> Result<bool> {
        while self.buffer.len() < self.layout.length() {
            let got = self.asks.read_buf(&mut self.buffer).await;
            if got.map_err(Error::Relay)? == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Request {
    /// So many pages from this address on of the process with this number in its own namespace.
    Pages {
        process: u64,
        address: u64,
        pages: u64,
    },
    /// That there are no more requests.
    End,
}

impl Request {
    /// Reads one; nothing if it is something else.
    fn read(request: &[u8], layout: Layout) -> Option<Request> {
        let Fields {
            word,
            flags,
            pages,
            address,
            memory: process,
        } = Fields::read(request, layout)?;
        match word {
            GET if flags == 0 && (1..=MOST_PAGES).contains(&pages) => Some(Request::Pages {
                process,
                address,
                pages,
            }),
            CLOSE | FORCE_CLOSE if flags == 0 => Some(Request::End),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt;
    use proptest::prelude::*;

    use super::super::tests::command;
    use super::*;

    const BOTH: [Layout; 2] = [Layout::Narrow, Layout::Wide];

    #[tokio::test]
    async fn requests_for_pages_pass_as_they_are() {
        for layout in BOTH {
            let get = command(layout, 7, 9, 0x1000, 1 << 8 | 1);
            let end = command(layout, 0x1023, 0, 0, 0);
            let stream = [get.clone(), end.clone()].concat();
            let passed: Vec<_> = requests(stream.as_slice(), layout).collect().await;
            let passed: Vec<Bytes> = passed.into_iter().map(Result::unwrap).collect();
            assert_eq!(passed, [get, end]);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_but_pages_can_be_asked_for(input in proptest::collection::vec(any::<u8>(), 0..200), word in prop_oneof![Just(6u32), Just(2), Just(4), Just(7 | 4 << 16), Just(0x1023)]) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            for layout in BOTH {
                let stream = [command(layout, word, 1, 0, 1 << 8 | 1), input.clone()].concat();
                let passed: Vec<_> = runtime.block_on(requests(stream.as_slice(), layout).collect());
                for request in passed.into_iter().flatten() {
                    prop_assert!(Request::read(&request, layout).is_some());
                    prop_assert_eq!(request.len(), layout.length());
                }
            }
        }
    }
}
