//! A connection's bytes: below TLS the socket, above it the heads and bodies of HTTP, each with
//! the time-outs that neither TLS nor HTTP has of its own.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use hyper::body::{Body as _, Incoming};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use super::{Error, Limits, Result};

/// What a connection's socket has to tell to those above TLS.
#[derive(Debug, Default)]
pub(super) struct WireState {
    /// A write was given up because the other side took nothing.
    stalled: AtomicBool,
}

impl WireState {
    pub(super) fn stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }
}

/// A TCP socket under TLS.
///
/// - Reads are made in large pieces: rustls asks for 4 KiB at a time, which would be a system call
///   for each.
/// - A write that waits for longer than the stall time-out fails.
/// - Shutting down goes on reading for a while. Closing a socket with unread data in it makes the
///   kernel send a reset, and a reset makes the other side throw away what it has not read yet:
///   the very answer that says why it was refused.
#[derive(Debug)]
pub(super) struct Wire {
    tcp: TcpStream,
    state: Arc<WireState>,
    /// Empty until the handshake is over: strangers get no buffer.
    buffer: Box<[u8]>,
    /// The part of the buffer that is still to be read.
    filled: std::ops::Range<usize>,
    stall: Duration,
    /// Runs while a write waits.
    writing: Option<Pin<Box<Sleep>>>,
    linger: Duration,
    /// Runs from shutdown on.
    lingering: Option<Pin<Box<Sleep>>>,
}

impl Wire {
    pub(super) fn new(tcp: TcpStream, limits: &Limits) -> io::Result<Wire> {
        // Requests wait for answers: nothing may be held back for more to come. The buffers of the
        // socket are left to the kernel, which makes them larger than SO_SNDBUF could.
        tcp.set_nodelay(true)?;
        Ok(Wire {
            tcp,
            state: Arc::default(),
            buffer: Box::default(),
            filled: 0..0,
            stall: limits.stall,
            writing: None,
            linger: limits.linger,
            lingering: None,
        })
    }

    pub(super) fn state(&self) -> Arc<WireState> {
        self.state.clone()
    }

    /// Gives it a buffer, once it is known whose it is.
    pub(super) fn set_buffer(&mut self, size: usize) {
        if self.filled.is_empty() {
            self.buffer = vec![0; size].into();
            self.filled = 0..0;
        }
    }

    /// The result of a write, unless it has waited for too long.
    fn watch(
        &mut self,
        cx: &mut Context<'_>,
        result: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        if result.is_ready() {
            self.writing = None;
            return result;
        }
        let stall = self.stall;
        let timer = self
            .writing
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(stall)));
        ready!(timer.as_mut().poll(cx));
        self.state.stalled.store(true, Ordering::Relaxed);
        Poll::Ready(Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the other side took nothing for too long",
        )))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.filled.is_empty() {
            if into.remaining() >= this.buffer.len() {
                return Pin::new(&mut this.tcp).poll_read(cx, into);
            }
            let mut buffer = ReadBuf::new(&mut this.buffer);
            ready!(Pin::new(&mut this.tcp).poll_read(cx, &mut buffer))?;
            this.filled = 0..buffer.filled().len();
        }
        let some = &this.buffer[this.filled.clone()];
        let some = &some[..some.len().min(into.remaining())];
        into.put_slice(some);
        this.filled.start += some.len();
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.tcp).poll_write(cx, from);
        this.watch(cx, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.tcp).poll_write_vectored(cx, from);
        this.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.lingering.is_none() {
            ready!(Pin::new(&mut this.tcp).poll_shutdown(cx))?;
            let linger = this.linger;
            this.lingering = Some(Box::pin(tokio::time::sleep(linger)));
        }
        let mut scratch = [std::mem::MaybeUninit::uninit(); 16 * 1024];
        // In rounds, so that a fast sender does not keep this task from all others.
        for _ in 0..16 {
            if let Some(timer) = &mut this.lingering
                && timer.as_mut().poll(cx).is_ready()
            {
                return Poll::Ready(Ok(()));
            }
            let mut buffer = ReadBuf::uninit(&mut scratch);
            match ready!(Pin::new(&mut this.tcp).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                // The end, or it was reset: there is nobody left to wait for.
                _ => return Poll::Ready(Ok(())),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// Where an agent's connection stands between the heads of two requests.
#[derive(Debug, Default)]
pub(super) struct HeadState(AtomicU8);

impl HeadState {
    /// Nothing of the next request has come.
    const IDLE: u8 = 0;
    /// Some of the next head has come.
    const HEAD: u8 = 1;
    /// A request is in work.
    const BUSY: u8 = 2;

    /// The head is complete.
    pub(super) fn begin(&self) {
        self.0.store(HeadState::BUSY, Ordering::Relaxed);
    }

    /// The answer was given.
    pub(super) fn end(&self) {
        self.0.store(HeadState::IDLE, Ordering::Relaxed);
    }
}

/// The plain text of an agent's connection, which fails when a head takes too long.
///
/// hyper has one time-out for a head, counted from the end of the request before. It has to be
/// long, as a peer may be silent between requests; a head that has begun may not take as long.
#[derive(Debug)]
pub(super) struct Heads<S> {
    inner: S,
    state: Arc<HeadState>,
    limit: Duration,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<S> Heads<S> {
    pub(super) fn new(inner: S, state: Arc<HeadState>, limit: Duration) -> Heads<S> {
        Heads {
            inner,
            state,
            limit,
            timer: None,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Heads<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        let result = Pin::new(&mut this.inner).poll_read(cx, into);
        let state = this.state.0.load(Ordering::Relaxed);
        if state != HeadState::HEAD {
            // Of the head before, if at all.
            this.timer = None;
        }
        if state == HeadState::BUSY {
            return result;
        }
        if state == HeadState::IDLE && into.filled().len() > before {
            this.state.0.store(HeadState::HEAD, Ordering::Relaxed);
            let limit = this.limit;
            this.timer = Some(Box::pin(tokio::time::sleep(limit)));
        }
        if let Some(timer) = &mut this.timer
            && timer.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the head of a request took too long",
            )));
        }
        result
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heads<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, from)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, from)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

/// A body as it arrives: of a request at the agent, of an answer at the caller.
///
/// It is a stream of pieces, none larger than [`Limits::read_buffer`]; nothing more is read from
/// the connection than is taken from it. It fails with [`Error::TimedOut`] when nothing arrives
/// for [`Limits::stall`], and with [`Error::Lost`] when the connection breaks before its end.
#[derive(Debug)]
pub struct Body {
    inner: Incoming,
    stall: Duration,
    timer: Pin<Box<Sleep>>,
    /// Whether the timer runs: it does while somebody waits.
    waiting: bool,
    json: usize,
    json_time: Duration,
}

impl Body {
    pub(super) fn new(inner: Incoming, limits: &Limits) -> Body {
        Body {
            inner,
            stall: limits.stall,
            timer: Box::pin(tokio::time::sleep(limits.stall)),
            waiting: false,
            json: limits.json,
            json_time: limits.json_time,
        }
    }

    /// Reads the whole body as JSON, of at most [`Limits::json`] bytes within
    /// [`Limits::json_time`].
    ///
    /// # Errors
    /// [`Error::TooLarge`], [`Error::TimedOut`], [`Error::BadJson`], [`Error::Lost`].
    pub async fn json<T: DeserializeOwned>(self) -> Result<T> {
        let limit = self.json;
        self.json_up_to(limit, "json").await
    }

    pub(super) async fn json_up_to<T: DeserializeOwned>(
        self,
        limit: usize,
        name: &'static str,
    ) -> Result<T> {
        let time = self.json_time;
        let content = tokio::time::timeout(time, self.collect(limit, name))
            .await
            .map_err(|_| Error::TimedOut {
                doing: "reading a JSON body",
                limit: "json_time",
                after: time,
            })??;
        // An empty body stands for "nothing to say".
        let content = if content.is_empty() {
            b"null"
        } else {
            content.as_slice()
        };
        serde_json::from_slice(content).map_err(|source| Error::BadJson {
            what: "a JSON body",
            source,
        })
    }

    async fn collect(mut self, limit: usize, name: &'static str) -> Result<Vec<u8>> {
        let too_large = || Error::TooLarge {
            what: "a JSON body",
            limit: name,
            bytes: limit,
        };
        // What was announced as too large is not read at all.
        if self.inner.size_hint().lower() > limit as u64 {
            return Err(too_large());
        }
        let mut content = Vec::new();
        while let Some(piece) = self.next().await {
            let piece = piece?;
            if piece.len() > limit - content.len() {
                return Err(too_large());
            }
            content.extend_from_slice(&piece);
        }
        Ok(content)
    }
}

impl Stream for Body {
    type Item = Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match Pin::new(&mut this.inner).poll_frame(cx) {
                Poll::Ready(frame) => {
                    this.waiting = false;
                    return Poll::Ready(match frame {
                        None => None,
                        Some(Ok(frame)) => match frame.into_data() {
                            Ok(data) => Some(Ok(data)),
                            // Trailers say nothing in this protocol.
                            Err(_) => continue,
                        },
                        Some(Err(source)) => Some(Err(Error::Lost {
                            doing: "receiving a body",
                            source,
                        })),
                    });
                }
                Poll::Pending => {
                    if !this.waiting {
                        this.waiting = true;
                        this.timer.as_mut().reset(Instant::now() + this.stall);
                    }
                    ready!(this.timer.as_mut().poll(cx));
                    this.waiting = false;
                    return Poll::Ready(Some(Err(Error::TimedOut {
                        doing: "waiting for more of a body",
                        limit: "stall",
                        after: this.stall,
                    })));
                }
            }
        }
    }
}
