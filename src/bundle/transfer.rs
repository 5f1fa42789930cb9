//! The image stream on the wire, with its checksum.
//!
//! # Form
//! The body is a row of frames. A frame is a length (four bytes, most significant first, at most
//! 1 MiB) and that many bytes of content; or, where the highest bit of the length is set, that many
//! bytes of one zstd frame (RFC 8878) with at most 1 MiB of content in it. A frame of length zero is
//! the last; behind it stands the trailer: the number of bytes of content (eight bytes, most
//! significant first) and their XXH3 checksum (16 bytes, likewise). Nothing may follow. Number and
//! checksum are those of the content before compression, so they vouch for the way through the
//! compressor as well.
//!
//! # What the checksum is for
//! That nobody changes the stream on its way is TLS's doing, byte by byte. The checksum finds what goes wrong
//! at the two ends of that: in a compressor, in framing, in memory. Against a sender that lies no digest
//! helps, since the sender is who computes it; and one made to withstand forgery (BLAKE3 was here) took a
//! third of the time of a large container's way.
//!
//! # Why Podman is safe from a damaged stream
//! The receiver hands content on as it arrives, for time is downtime. Podman's import does nothing
//! until the body of the request has arrived completely. So the receiver's stream *ends* only if
//! the trailer is right; otherwise its last item is an error, which aborts the request to Podman.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::stream::{self, BoxStream};
use futures::{Stream, StreamExt, TryStreamExt};

use super::checksum::{Checksum, Meter};
use super::compression::{Compression, Packer};
use super::{Error, Result};

/// The longest frame, and the most that is in one: 1 MiB.
pub const MAX_FRAME: usize = 1 << 20;
/// Set in the length of a frame that is compressed.
const COMPRESSED: u32 = 1 << 31;
/// Bytes of the trailer behind the last frame.
const TRAILER: usize = 8 + size_of::<u128>();

/// Watches a stream from outside: how far it is, and its checksum once it is through.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<Watched>);

#[derive(Debug, Default)]
struct Watched {
    content: AtomicU64,
    wire: AtomicU64,
    checksum: Mutex<Option<Checksum>>,
}

impl Progress {
    /// Bytes of content so far, before compression.
    pub fn content(&self) -> u64 {
        self.0.content.load(Ordering::Relaxed)
    }

    /// Bytes on the wire so far, framing included.
    pub fn wire(&self) -> u64 {
        self.0.wire.load(Ordering::Relaxed)
    }

    /// The checksum, once the stream has ended well: at the receiver, once it has been found right.
    pub fn checksum(&self) -> Option<Checksum> {
        *self
            .0
            .checksum
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// So many bytes of content have gone.
    fn set_content(&self, bytes: u64) {
        self.0.content.store(bytes, Ordering::Relaxed);
    }

    /// So many bytes more have gone.
    pub(crate) fn add_wire(&self, bytes: usize) {
        self.0.wire.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    fn finish(&self, checksum: Checksum) {
        *self
            .0
            .checksum
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(checksum);
    }
}

/// Turns content into the form that crosses the wire, compressed where that is quicker.
///
/// # Errors
/// The stream fails, without a trailer, if the content's stream fails.
pub fn send<S, E>(content: S) -> (impl Stream<Item = Result<Bytes>> + Send, Progress)
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    send_as(content, Compression::default())
}

/// The same, with a say in what is compressed.
pub(crate) fn send_as<S, E>(
    content: S,
    compression: Compression,
) -> (impl Stream<Item = Result<Bytes>> + Send, Progress)
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let progress = Progress::default();
    let sender = Sender {
        content: content.map_err(|e| Error::Upstream(Box::new(e))).boxed(),
        piece: Bytes::new(),
        body: None,
        given: None,
        meter: Meter::new(),
        packer: Packer::new(compression),
        progress: progress.clone(),
        ended: false,
    };
    let wire = stream::try_unfold(sender, |mut sender| async move {
        Ok(sender.next().await?.map(|bytes| (bytes, sender)))
    });
    (wire, progress)
}

/// Content, while it is sent.
struct Sender {
    content: BoxStream<'static, Result<Bytes>>,
    /// What is left of a piece of it.
    piece: Bytes,
    /// What belongs to the length that went last.
    body: Option<Bytes>,
    /// What the connection was given last, and when.
    given: Option<(Instant, usize)>,
    meter: Meter,
    packer: Packer,
    progress: Progress,
    ended: bool,
}

impl Sender {
    async fn next(&mut self) -> Result<Option<Bytes>> {
        if let Some((then, bytes)) = self.given.take() {
            // The connection asks for more when it has taken what it had.
            self.packer.taken(bytes, then.elapsed());
        }
        let bytes = match self.body.take() {
            Some(body) => {
                self.given = Some((Instant::now(), body.len()));
                body
            }
            None if self.ended => return Ok(None),
            None => self.head().await?,
        };
        self.progress.add_wire(bytes.len());
        Ok(Some(bytes))
    }

    /// The length of the next frame, whose body is put by; or the last frame with the trailer.
    async fn head(&mut self) -> Result<Bytes> {
        while self.piece.is_empty() {
            let Some(piece) = self.content.try_next().await? else {
                return Ok(self.trailer());
            };
            self.meter.update(&piece);
            self.progress.set_content(self.meter.bytes());
            self.piece = piece;
        }
        let part = self.piece.split_to(self.piece.len().min(MAX_FRAME));
        let (body, mark) = match self.packer.pack(&part) {
            Some(packed) => (Bytes::from(packed), COMPRESSED),
            None => (part, 0),
        };
        // At most MAX_FRAME.
        let length = body.len() as u32;
        self.body = Some(body);
        Ok(Bytes::copy_from_slice(&(length | mark).to_be_bytes()))
    }

    fn trailer(&mut self) -> Bytes {
        self.ended = true;
        let checksum = self.meter.checksum();
        self.progress.finish(checksum);
        let mut last = BytesMut::with_capacity(4 + TRAILER);
        last.put_u32(0);
        last.put_u64(checksum.bytes);
        last.put_u128(checksum.xxh3);
        last.freeze()
    }
}

/// Ends a stream behind its first error, so that nothing can follow it, a trailer least of all.
pub(super) fn until_error<S>(items: S) -> impl Stream<Item = Result<Bytes>> + Send
where
    S: Stream<Item = Result<Bytes>> + Send,
{
    stream::try_unfold(Box::pin(items), |mut items| async move {
        Ok(items.try_next().await?.map(|item| (item, items)))
    })
}

/// Turns what came over the wire back into content.
///
/// `limit` bounds the content in bytes, after decompression. The last item is an error unless
/// everything arrived as it was sent: hand the stream to something that acts on a clean end only.
///
/// # Errors
/// The stream fails if the wire's stream does, and with [`Error::Malformed`],
/// [`Error::Truncated`], [`Error::TooLong`] and [`Error::Mismatch`].
pub fn receive<S, E>(wire: S, limit: u64) -> (impl Stream<Item = Result<Bytes>> + Send, Progress)
where
    S: Stream<Item = Result<Bytes, E>> + Send + 'static,
    E: std::error::Error + Send + Sync + 'static,
{
    let progress = Progress::default();
    let frames = Frames {
        wire: wire.map_err(|e| Error::Upstream(Box::new(e))).boxed(),
        piece: Bytes::new(),
        state: Reading::Head(BytesMut::with_capacity(TRAILER)),
        progress: progress.clone(),
    };
    let state = (frames, Meter::new(), progress.clone());
    let content = stream::try_unfold(state, move |(mut frames, mut meter, progress)| async move {
        if let Some(piece) = frames.try_next().await? {
            meter.update(&piece);
            progress.set_content(meter.bytes());
            if meter.bytes() > limit {
                return Err(Error::TooLong { limit });
            }
            return Ok(Some((piece, (frames, meter, progress))));
        }
        let received = meter.checksum();
        let Reading::End(sent) = frames.state else {
            return Err(Error::Truncated {
                bytes: received.bytes,
            });
        };
        if sent != received {
            return Err(Error::Mismatch { sent, received });
        }
        progress.finish(received);
        Ok(None)
    });
    (content, progress)
}

/// Takes frames apart, and what is in them. The stream ends behind a complete trailer, and fails if there
/// is none.
struct Frames {
    wire: BoxStream<'static, Result<Bytes>>,
    piece: Bytes,
    state: Reading,
    progress: Progress,
}

enum Reading {
    /// The length of a frame.
    Head(BytesMut),
    /// So many bytes of a frame are still to come.
    Body(usize),
    /// A compressed frame of this length, of which so much has come.
    Compressed(usize, BytesMut),
    Trailer(BytesMut),
    /// Behind the trailer.
    End(Checksum),
}

impl Reading {
    /// The next frame.
    fn anew() -> Reading {
        Reading::Head(BytesMut::with_capacity(TRAILER))
    }

    /// What this length begins.
    fn of(head: u32) -> Result<Reading> {
        let length = (head & !COMPRESSED) as usize;
        match head {
            0 => Ok(Reading::Trailer(BytesMut::with_capacity(TRAILER))),
            _ if length > MAX_FRAME => Err(Error::Malformed {
                what: "a frame is longer than 1 MiB",
            }),
            // Room is made as it comes.
            _ if head & COMPRESSED != 0 => Ok(Reading::Compressed(length, BytesMut::new())),
            _ => Ok(Reading::Body(length)),
        }
    }
}

impl Stream for Frames {
    type Item = Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            if this.piece.is_empty() {
                match ready!(this.wire.poll_next_unpin(cx)) {
                    Some(Ok(piece)) => {
                        this.progress.add_wire(piece.len());
                        this.piece = piece;
                    }
                    Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                    None => {
                        return Poll::Ready(match this.state {
                            Reading::End(_) => None,
                            _ => Some(Err(Error::Truncated {
                                bytes: this.progress.content(),
                            })),
                        });
                    }
                }
                continue;
            }
            let mut at_most = |missing: usize| this.piece.split_to(this.piece.len().min(missing));
            match &mut this.state {
                Reading::End(_) => {
                    let what = "there is data behind the trailer";
                    return Poll::Ready(Some(Err(Error::Malformed { what })));
                }
                Reading::Body(left) => {
                    let part = at_most(*left);
                    *left -= part.len();
                    if *left == 0 {
                        this.state = Reading::anew();
                    }
                    return Poll::Ready(Some(Ok(part)));
                }
                Reading::Compressed(length, packed) => {
                    packed.put(at_most(*length - packed.len()));
                    if packed.len() == *length {
                        let content = zstd::bulk::decompress(packed, MAX_FRAME);
                        this.state = Reading::anew();
                        return Poll::Ready(Some(match content {
                            Ok(content) => Ok(content.into()),
                            Err(_) => Err(UNREADABLE),
                        }));
                    }
                }
                Reading::Head(head) => {
                    head.put(at_most(4 - head.len()));
                    if head.len() == 4 {
                        match Reading::of(head.get_u32()) {
                            Ok(next) => this.state = next,
                            Err(error) => return Poll::Ready(Some(Err(error))),
                        }
                    }
                }
                Reading::Trailer(trailer) => {
                    trailer.put(at_most(TRAILER - trailer.len()));
                    if trailer.len() == TRAILER {
                        let bytes = trailer.get_u64();
                        let xxh3 = trailer.get_u128();
                        this.state = Reading::End(Checksum { bytes, xxh3 });
                    }
                }
            }
        }
    }
}

const UNREADABLE: Error = Error::Malformed {
    what: "it cannot be decompressed",
};

/// Takes an error of ours out of the system's error type, in which it went through a reader.
pub(super) fn from_io(error: std::io::Error) -> Error {
    error.downcast::<Error>().unwrap_or(UNREADABLE)
}

#[cfg(test)]
mod tests {
    use std::io;

    use proptest::prelude::*;

    use super::*;

    fn run<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .expect("a runtime");
        runtime.block_on(future)
    }

    fn pieces(content: &[u8], size: usize) -> Vec<io::Result<Bytes>> {
        content
            .chunks(size)
            .map(|piece| Ok(Bytes::copy_from_slice(piece)))
            .collect()
    }

    fn sent(content: &[u8], size: usize, compression: Compression) -> (Vec<u8>, Progress) {
        let (wire, progress) = send_as(stream::iter(pieces(content, size)), compression);
        let wire = run(wire.map_ok(|b| b.to_vec()).try_concat()).expect("no failure");
        assert_eq!(progress.wire(), wire.len() as u64);
        (wire, progress)
    }

    /// What came out, whether well or not, and how it ended.
    fn received(wire: &[u8], size: usize, limit: u64) -> (Vec<u8>, Result<Checksum>) {
        let (content, progress) = receive(stream::iter(pieces(wire, size)), limit);
        let mut got = Vec::new();
        let end = run(content.try_for_each(|piece| {
            got.extend_from_slice(&piece);
            std::future::ready(Ok(()))
        }));
        let end = end.map(|()| progress.checksum().expect("a checksum after a clean end"));
        if end.is_err() {
            assert_eq!(progress.checksum(), None);
        }
        (got, end)
    }

    const BOTH: [Compression; 2] = [Compression::Measured, Compression::Always];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_sent_arrives(
            content in prop::collection::vec(any::<u8>(), 0..20_000),
            cut_here in 1usize..5000,
            cut_there in 1usize..5000,
        ) {
            for compression in BOTH {
                let (wire, progress) = sent(&content, cut_here, compression);
                let (got, end) = received(&wire, cut_there, 20_000);
                prop_assert_eq!(&got, &content);
                prop_assert_eq!(end.ok(), progress.checksum());
                prop_assert_eq!(progress.content(), content.len() as u64);
            }
        }

        #[test]
        fn damage_never_ends_well(
            content in prop::collection::vec(any::<u8>(), 0..3000),
            at in any::<prop::sample::Index>(),
            bit in 0u8..8,
        ) {
            for compression in BOTH {
                let (mut wire, _) = sent(&content, 700, compression);
                let at = at.index(wire.len());
                wire[at] ^= 1 << bit;
                let (got, end) = received(&wire, 900, 1 << 20);
                // zstd's own header has bits that mean nothing: then the content must be right.
                prop_assert!(end.is_err() || got == content, "{end:?}");
            }
        }

        #[test]
        fn a_lost_end_never_ends_well(
            content in prop::collection::vec(any::<u8>(), 0..3000),
            lost in 1usize..3000,
        ) {
            for compression in BOTH {
                let (wire, _) = sent(&content, 700, compression);
                let kept = wire.len().saturating_sub(lost);
                let (_, end) = received(&wire[..kept], 900, 1 << 20);
                prop_assert!(end.is_err());
            }
        }
    }

    #[test]
    fn the_limit_holds_for_what_comes_out_of_decompression() {
        let content = vec![0; 5 << 20];
        let (wire, _) = sent(&content, 1 << 20, Compression::Always);
        assert!(wire.len() < 100_000, "{} bytes", wire.len());
        let (got, end) = received(&wire, 4096, 1 << 20);
        assert!(matches!(end, Err(Error::TooLong { .. })), "{end:?}");
        assert!(got.len() <= 1 << 20);
    }

    #[test]
    fn large_pieces_become_frames_that_are_not_too_long() {
        let content = vec![7; 3 * MAX_FRAME + 5];
        let (wire, _) = sent(&content, content.len(), Compression::Measured);
        let (got, end) = received(&wire, 1 << 16, u64::MAX);
        assert_eq!(got, content);
        end.expect("a clean end");
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused() {
        let (_, end) = received(&[0x7f, 0, 0, 0, 1], 5, u64::MAX);
        assert!(matches!(end, Err(Error::Malformed { .. })), "{end:?}");
    }

    /// Well-formed to the last byte, and the checksum is of something else.
    #[test]
    fn a_forged_checksum_is_named() {
        for compression in BOTH {
            let (mut wire, _) = sent(b"what really comes", 7, compression);
            let end = wire.len() - size_of::<u128>();
            let forged = twox_hash::XxHash3_128::oneshot(b"what was agreed to");
            wire[end..].copy_from_slice(&forged.to_be_bytes());
            let (_, end) = received(&wire, 1000, 100);
            assert!(matches!(end, Err(Error::Mismatch { .. })), "{end:?}");
        }
    }

    #[test]
    fn a_frame_with_more_in_it_than_it_may_have_is_refused() {
        for (length, fits) in [(MAX_FRAME, true), (MAX_FRAME + 1, false)] {
            let packed = zstd::bulk::compress(&vec![0; length], 1).expect("compressed");
            let head = (packed.len() as u32 | COMPRESSED).to_be_bytes();
            let (got, end) = received(&[&head[..], &packed].concat(), 1000, u64::MAX);
            let refused = matches!(end, Err(Error::Malformed { .. }));
            assert_eq!((got.len() == length, !refused), (fits, fits), "{end:?}");
        }
    }

    #[test]
    fn data_behind_the_trailer_is_refused() {
        for compression in BOTH {
            let (mut wire, _) = sent(b"content", 7, compression);
            wire.push(0);
            let (_, end) = received(&wire, 1000, 100);
            assert!(matches!(end, Err(Error::Malformed { .. })), "{end:?}");
        }
    }

    #[test]
    fn a_source_that_fails_sends_no_trailer() {
        for compression in BOTH {
            let content =
                stream::iter([Ok(Bytes::from_static(b"x")), Err(io::Error::other("gone"))]);
            let (wire, progress) = send_as(content, compression);
            let items: Vec<_> = run(wire.collect());
            assert!(
                matches!(items.last(), Some(Err(Error::Upstream(_)))),
                "{items:?}"
            );
            assert_eq!(progress.checksum(), None);
        }
    }

    #[test]
    fn a_checksum_has_a_readable_json_form() {
        let (_, progress) = sent(b"", 1, Compression::Measured);
        let checksum = progress.checksum().expect("a checksum");
        let text = serde_json::to_string(&checksum).expect("JSON");
        // That of nothing, from XXH3's reference implementation.
        assert_eq!(
            text,
            r#"{"bytes":0,"xxh3":"99aa06d3014798d86001c324468d497f"}"#
        );
        assert_eq!(
            serde_json::from_str::<Checksum>(&text).expect("parsed"),
            checksum
        );
    }
}
