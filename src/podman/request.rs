//! One HTTP request over Podman's unix socket, for what podman-api cannot do.
//!
//! A connection per request: Podman's service is local, and a connection that is in nobody's pool
//! can be closed by dropping it, which is how a call is cancelled. Every wait has an end. Answers
//! that are read whole are bounded; archives are never read whole.

use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{FutureExt, Stream, StreamExt, TryStreamExt, future};
use http_body_util::{BodyExt, Full, LengthLimitError, Limited, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};

use super::error::{Error, Result};

/// A stream of bytes out of Podman. Dropping it closes the connection.
pub type Chunks = BoxStream<'static, Result<Bytes>>;

/// The API version in the path.
///
/// Podman 4.9 and every 5.x answer to it, and all of them in the form of 4.9: on a path of
/// version 5 some fields change their type. There are no paths without a version for libpod calls
/// (5.8 answers 404).
const API: &str = "/v4.9.0/libpod";

/// The most that is read of an answer in JSON. The inspection of a container with thousands of
/// ports and labels takes less than 1 MiB.
const JSON_LIMIT: usize = 16 << 20;

/// The most that is read of an error's text.
const ERROR_LIMIT: usize = 64 << 10;

/// What a request is for, which every error about it names.
#[derive(Debug, Clone)]
pub(super) struct Purpose {
    pub doing: &'static str,
    pub what: String,
}

impl Purpose {
    pub fn new(doing: &'static str, what: impl Into<String>) -> Self {
        Purpose {
            doing,
            what: what.into(),
        }
    }

    pub fn timeout(&self, after: Duration) -> Error {
        Error::Timeout {
            doing: self.doing,
            what: self.what.clone(),
            after,
        }
    }

    pub fn connection(&self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
        Error::Connection {
            doing: self.doing,
            what: self.what.clone(),
            source: source.into(),
        }
    }

    pub fn malformed(&self, reason: impl Into<String>) -> Error {
        Error::Malformed {
            doing: self.doing,
            what: self.what.clone(),
            reason: reason.into(),
        }
    }

    pub fn refused(&self, status: u16, cause: String, message: String) -> Error {
        /// What Podman says, with status 500, of a container that was removed while it looked at it
        /// (`ErrNoSuchCtr` in `libpod/define/errors.go`).
        const GONE_MEANWHILE: &str = "no such container";
        if status == StatusCode::NOT_FOUND.as_u16() || cause == GONE_MEANWHILE {
            return Error::NotFound {
                doing: self.doing,
                what: self.what.clone(),
                message,
            };
        }
        Error::Refused {
            doing: self.doing,
            what: self.what.clone(),
            cause,
            message,
            status,
        }
    }
}

/// A request that is about to be sent.
pub(super) struct Call<'a> {
    pub purpose: Purpose,
    pub method: Method,
    /// Below `/libpod`, already encoded.
    pub path: &'a str,
    pub query: Query,
    /// How long Podman may be silent before its answer begins; counted anew with every piece of
    /// the request's body.
    pub wait: Duration,
}

/// The part of a path after the question mark.
#[derive(Debug, Default, Clone)]
pub(super) struct Query(String);

impl Query {
    pub fn new() -> Self {
        Query::default()
    }

    pub fn with(mut self, key: &str, value: &str) -> Self {
        self.0.push(if self.0.is_empty() { '?' } else { '&' });
        self.0.push_str(key);
        self.0.push('=');
        self.0.push_str(&encode(value));
        self
    }

    /// Leaves the key out when it is false, which is what Podman takes for all of them.
    pub fn flag(self, key: &str, on: bool) -> Self {
        if on { self.with(key, "true") } else { self }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
pub(super) fn encode(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

type Body = BoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// A request's body, and what came of the stream behind it.
pub(super) struct Upload {
    body: Body,
    kind: Option<&'static str>,
    progress: Option<Arc<Mutex<Progress>>>,
}

struct Progress {
    last: Instant,
    failure: Option<Box<dyn std::error::Error + Send + Sync>>,
}

fn lock(progress: &Mutex<Progress>) -> std::sync::MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Upload {
    pub fn empty() -> Self {
        Upload::whole(Bytes::new(), None)
    }

    pub fn json(value: &serde_json::Value) -> Self {
        Upload::whole(value.to_string().into(), Some("application/json"))
    }

    fn whole(bytes: Bytes, kind: Option<&'static str>) -> Self {
        Upload {
            body: Full::new(bytes).map_err(|never| match never {}).boxed(),
            kind,
            progress: None,
        }
    }

    /// A tar archive, sent as it comes.
    pub fn archive<S, E>(archive: S) -> Self
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let progress = Arc::new(Mutex::new(Progress {
            last: Instant::now(),
            failure: None,
        }));
        let seen = progress.clone();
        let frames = archive.map(move |chunk| {
            let mut progress = lock(&seen);
            progress.last = Instant::now();
            match chunk {
                Ok(bytes) => Ok(Frame::data(bytes)),
                Err(error) => {
                    // hyper reports its own "user body" error; the real one is kept aside.
                    progress.failure = Some(error.into());
                    Err("the archive failed".into())
                }
            }
        });
        Upload {
            // A body has to be Sync, which not every stream is; only one task ever polls it.
            body: BodyExt::boxed(StreamBody::new(Exclusive::new(frames.boxed()))),
            kind: Some("application/x-tar"),
            progress: Some(progress),
        }
    }
}

/// Makes a stream `Sync` by giving no access to it but through `&mut`.
struct Exclusive<S>(Mutex<S>);

impl<S> Exclusive<S> {
    fn new(stream: S) -> Self {
        Exclusive(Mutex::new(stream))
    }
}

impl<S: Stream + Unpin> Stream for Exclusive<S> {
    type Item = S::Item;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let stream = self
            .get_mut()
            .0
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        Pin::new(stream).poll_next(cx)
    }
}

/// The task that drives a connection; dropping it closes the connection.
struct Driver(JoinHandle<()>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// An answer whose status says that it is one.
pub(super) struct Answer {
    response: Response<Incoming>,
    driver: Driver,
    purpose: Purpose,
    stall: Duration,
}

/// How to reach the socket, and how long to wait there.
#[derive(Debug, Clone)]
pub(super) struct Socket {
    path: Arc<Path>,
    connect: Duration,
    stall: Duration,
}

impl Socket {
    pub fn new(path: &Path, connect: Duration, stall: Duration) -> Self {
        Socket {
            path: path.into(),
            connect,
            stall,
        }
    }

    /// Connects, which is how it is found out early and clearly that Podman is not there.
    pub async fn connect(&self, purpose: &Purpose) -> Result<UnixStream> {
        let refused = |source| Error::Connect {
            doing: purpose.doing,
            socket: self.path.to_path_buf(),
            source,
        };
        match timeout(self.connect, UnixStream::connect(&self.path)).await {
            Ok(connected) => connected.map_err(refused),
            Err(_) => Err(purpose.timeout(self.connect)),
        }
    }

    /// Sends the call and waits for the head of the answer. A status that is an error is one.
    pub async fn send(&self, call: Call<'_>, upload: Upload) -> Result<Answer> {
        let purpose = call.purpose;
        let stream = self.connect(&purpose).await?;
        let (mut sender, connection) = timeout(
            self.connect,
            hyper::client::conn::http1::handshake(TokioIo::new(stream)),
        )
        .await
        .map_err(|_| purpose.timeout(self.connect))?
        .map_err(|e| purpose.connection(e))?;
        // The connection's own error comes out of the request or the body as well.
        let driver = Driver(tokio::spawn(connection.map(drop)));

        let Upload {
            body,
            kind,
            progress,
        } = upload;
        let uri = format!("{API}{}{}", call.path, call.query.as_str());
        tracing::debug!(method = %call.method, uri, "asking Podman");
        let mut request = Request::builder()
            .method(call.method)
            .uri(uri)
            // Podman answers 400 to HTTP/1.1 without it.
            .header(header::HOST, "podman");
        if let Some(kind) = kind {
            request = request.header(header::CONTENT_TYPE, kind);
        }
        let request = request
            .body(body)
            .map_err(|e| purpose.malformed(e.to_string()))?;

        let started = Instant::now();
        let mut answer = std::pin::pin!(sender.send_request(request));
        let response = loop {
            let last = progress.as_deref().map_or(started, |p| lock(p).last);
            tokio::select! {
                biased;
                answer = &mut answer => break answer,
                () = sleep_until(last + call.wait) => {
                    let newest = progress.as_deref().map_or(started, |p| lock(p).last);
                    if newest == last {
                        return Err(purpose.timeout(call.wait));
                    }
                }
            }
        };
        let failure = progress.as_deref().and_then(|p| lock(p).failure.take());
        if let Some(source) = failure {
            return Err(Error::Archive {
                doing: purpose.doing,
                what: purpose.what,
                source,
            });
        }
        let response = response.map_err(|e| purpose.connection(e))?;
        let status = response.status();
        tracing::debug!(%status, after_ms = started.elapsed().as_millis(), "Podman answers");
        let answer = Answer {
            response,
            driver,
            purpose,
            stall: self.stall,
        };
        if status.is_success() {
            Ok(answer)
        } else {
            Err(answer.into_error().await)
        }
    }
}

/// Podman's body of an error.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Fault {
    cause: String,
    message: String,
}

impl Answer {
    async fn bytes(self, limit: usize) -> Result<Bytes> {
        let Answer {
            response,
            driver: _driver,
            purpose,
            stall,
        } = self;
        let body = Limited::new(response.into_body(), limit);
        match timeout(stall, body.collect()).await {
            Err(_) => Err(purpose.timeout(stall)),
            Ok(Ok(collected)) => Ok(collected.to_bytes()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Error::TooLong {
                doing: purpose.doing,
                what: purpose.what,
                limit,
            }),
            Ok(Err(error)) => Err(purpose.connection(error)),
        }
    }

    async fn into_error(self) -> Error {
        let status = self.response.status();
        let purpose = self.purpose.clone();
        // Without its text the status is still an answer.
        let body = self.bytes(ERROR_LIMIT).await.unwrap_or_default();
        read_fault(&purpose, status, &body)
    }

    /// Reads the answer as JSON.
    pub async fn json<T: DeserializeOwned>(self) -> Result<T> {
        let purpose = self.purpose.clone();
        let body = self.bytes(JSON_LIMIT).await?;
        serde_json::from_slice(&body).map_err(|e| purpose.malformed(e.to_string()))
    }

    /// Reads the answer to its end and forgets it.
    pub async fn done(self) -> Result<()> {
        self.bytes(JSON_LIMIT).await.map(drop)
    }

    /// Reads the answer piece by piece.
    pub fn chunks(self) -> Chunks {
        let Answer {
            response,
            driver,
            purpose,
            stall,
        } = self;
        let broken = purpose.clone();
        let stream = Kept {
            inner: response
                .into_body()
                .into_data_stream()
                .map_err(move |e| broken.connection(e))
                .boxed(),
            _driver: driver,
        };
        stalling(stream, purpose, stall)
    }
}

pub(super) fn read_fault(purpose: &Purpose, status: StatusCode, body: &[u8]) -> Error {
    let fault = serde_json::from_slice::<Fault>(body).unwrap_or_default();
    let message = if fault.message.is_empty() {
        let text = String::from_utf8_lossy(body);
        let text = text.trim();
        if text.is_empty() {
            format!("status {status}")
        } else {
            text.to_owned()
        }
    } else {
        fault.message
    };
    purpose.refused(status.as_u16(), fault.cause, message)
}

/// A stream that keeps its connection open.
struct Kept {
    inner: Chunks,
    _driver: Driver,
}

impl Stream for Kept {
    type Item = Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Poll::Ready(ready!(self.inner.poll_next_unpin(cx)))
    }
}

/// Ends a stream with an error when no piece comes for `stall`, or after its first error.
pub(super) fn stalling<S>(stream: S, purpose: Purpose, stall: Duration) -> Chunks
where
    S: Stream<Item = Result<Bytes>> + Send + 'static,
{
    let state = Some((stream.boxed(), purpose));
    futures::stream::unfold(state, move |state| async move {
        let (mut stream, purpose) = state?;
        match timeout(stall, stream.next()).await {
            Ok(Some(Ok(chunk))) => Some((Ok(chunk), Some((stream, purpose)))),
            Ok(Some(Err(error))) => Some((Err(error), None)),
            Ok(None) => None,
            Err(_) => Some((Err(purpose.timeout(stall)), None)),
        }
    })
    .boxed()
}

/// Turns a stream that borrows from what made it into one that owns it: `pump` makes the stream
/// and sends what comes out of it. At most one item waits in between.
pub(super) fn owning<T, F, P>(pump: P) -> BoxStream<'static, T>
where
    T: Send + 'static,
    F: Future<Output = ()> + Send + 'static,
    P: FnOnce(futures::channel::mpsc::Sender<T>) -> F,
{
    let (sender, receiver) = futures::channel::mpsc::channel(0);
    let pump = futures::stream::once(pump(sender)).map(|()| None);
    futures::stream::select(receiver.map(Some), pump)
        .filter_map(future::ready)
        .boxed()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixListener;

    /// Answers one connection with `answer` after the request's head, then keeps it open.
    fn serve(answer: Vec<u8>) -> (tempfile::TempDir, Socket, JoinHandle<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let task = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.windows(4).any(|w| w == b"\r\n\r\n") {
                if stream.read_buf(&mut request).await.unwrap() == 0 {
                    break;
                }
            }
            stream.write_all(&answer).await.ok();
            // Until the client lets go.
            while stream.read_buf(&mut request).await.unwrap_or(0) != 0 {}
            request
        });
        let socket = Socket::new(&path, Duration::from_secs(2), Duration::from_millis(200));
        (dir, socket, task)
    }

    fn call(path: &str) -> Call<'_> {
        Call {
            purpose: Purpose::new("inspect", "web"),
            method: Method::GET,
            path,
            query: Query::new(),
            wait: Duration::from_millis(200),
        }
    }

    fn response(status: &str, body: &str) -> Vec<u8> {
        format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )
        .into_bytes()
    }

    #[tokio::test]
    async fn asks_with_a_host_header_and_a_version() {
        let (_dir, socket, server) = serve(response("200 OK", "{\"a\":1}"));
        let answer = socket
            .send(call("/containers/web/json"), Upload::empty())
            .await
            .unwrap();
        let value: serde_json::Value = answer.json().await.unwrap();
        assert_eq!(value["a"], 1);
        let request = String::from_utf8(server.await.unwrap()).unwrap();
        assert!(request.starts_with("GET /v4.9.0/libpod/containers/web/json HTTP/1.1\r\n"));
        assert!(request.to_lowercase().contains("\r\nhost: podman\r\n"));
    }

    #[tokio::test]
    async fn keeps_podmans_words() {
        let body = r#"{"cause":"no such container","message":"no container with name or ID \"web\" found: no such container","response":404}"#;
        let (_dir, socket, _server) = serve(response("404 Not Found", body));
        let error = socket
            .send(call("/x"), Upload::empty())
            .await
            .err()
            .unwrap();
        assert!(error.is_not_found());
        assert!(error.to_string().contains("no container with name"));

        // One that is being removed while it is looked at.
        let body = r#"{"cause":"no such container","message":"no container with ID 1 found in database: no such container","response":500}"#;
        let (_dir, socket, _server) = serve(response("500 Internal Server Error", body));
        let error = socket
            .send(call("/x"), Upload::empty())
            .await
            .err()
            .unwrap();
        assert!(error.is_not_found());

        let body = r#"{"cause":"c","message":"m: c","response":500}"#;
        let (_dir, socket, _server) = serve(response("500 Internal Server Error", body));
        match socket
            .send(call("/x"), Upload::empty())
            .await
            .err()
            .unwrap()
        {
            Error::Refused {
                cause,
                message,
                status,
                ..
            } => assert_eq!(
                (cause.as_str(), message.as_str(), status),
                ("c", "m: c", 500)
            ),
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn an_error_without_json_is_still_told() {
        let (_dir, socket, _server) = serve(response("400 Bad Request", "nope\n"));
        let error = socket
            .send(call("/x"), Upload::empty())
            .await
            .err()
            .unwrap();
        assert_eq!(error.to_string(), "cannot inspect web: nope");
    }

    #[tokio::test]
    async fn silence_ends() {
        let (_dir, socket, _server) = serve(Vec::new());
        let error = socket
            .send(call("/x"), Upload::empty())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        // ... in the middle of a body, too.
        let head = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc".to_vec();
        let (_dir, socket, _server) = serve(head);
        let answer = socket.send(call("/x"), Upload::empty()).await.unwrap();
        let got: Vec<_> = answer.chunks().collect().await;
        assert_eq!(got.len(), 2);
        assert_eq!(got[0].as_ref().unwrap(), &Bytes::from_static(b"abc"));
        assert!(matches!(got[1], Err(Error::Timeout { .. })));
    }

    #[tokio::test]
    async fn a_cut_off_body_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut head = [0; 4096];
            let _ = stream.read(&mut head).await.unwrap();
            stream
                .write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
                .await
                .unwrap();
        });
        let socket = Socket::new(&path, Duration::from_secs(2), Duration::from_secs(2));
        let answer = socket.send(call("/x"), Upload::empty()).await.unwrap();
        let got: Vec<_> = answer.chunks().collect().await;
        assert!(
            matches!(got.last(), Some(Err(Error::Connection { .. }))),
            "{got:?}"
        );
        server.await.unwrap();
    }

    #[tokio::test]
    async fn an_endless_answer_is_cut_short() {
        let mut answer = b"HTTP/1.1 200 OK\r\n\r\n".to_vec();
        answer.resize(JSON_LIMIT + 4096, b' ');
        let (_dir, socket, _server) = serve(answer);
        let answer = socket.send(call("/x"), Upload::empty()).await.unwrap();
        let error = answer.json::<serde_json::Value>().await.unwrap_err();
        assert!(matches!(error, Error::TooLong { .. }), "{error:?}");
    }

    #[tokio::test]
    async fn the_archives_own_error_comes_out() {
        let (_dir, socket, _server) = serve(Vec::new());
        let archive = futures::stream::iter([
            Ok(Bytes::from_static(b"abc")),
            Err(std::io::Error::other("the disk is on fire")),
        ]);
        let mut call = call("/x");
        call.method = Method::POST;
        call.wait = Duration::from_secs(5);
        let error = socket
            .send(call, Upload::archive(archive))
            .await
            .err()
            .unwrap();
        assert!(matches!(error, Error::Archive { .. }), "{error:?}");
        assert!(error.to_string().contains("on fire"));
    }

    #[tokio::test]
    async fn no_socket_no_answer() {
        let socket = Socket::new(
            Path::new("/nonexistent/podman.sock"),
            Duration::from_secs(1),
            Duration::from_secs(1),
        );
        let error = socket
            .send(call("/x"), Upload::empty())
            .await
            .err()
            .unwrap();
        assert!(matches!(error, Error::Connect { .. }));
    }

    #[test]
    fn encodes_what_would_end_a_value() {
        let query = Query::new()
            .with("publishPorts", "8080:80 9000:90/udp")
            .flag("keep", false)
            .flag("tcpEstablished", true);
        assert_eq!(
            query.as_str(),
            "?publishPorts=8080%3A80%209000%3A90%2Fudp&tcpEstablished=true"
        );
    }

    #[tokio::test]
    async fn an_owning_stream_ends_with_its_source() {
        use futures::SinkExt;
        let stream = owning(|mut sender| async move {
            for n in 0..100 {
                if sender.send(n).await.is_err() {
                    return;
                }
            }
        });
        let got: Vec<i32> = stream.collect().await;
        assert_eq!(got, (0..100).collect::<Vec<_>>());
    }
}
