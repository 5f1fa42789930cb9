//! The calling side: one TLS connection to one agent, kept open.

use std::error::Error as StdError;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use rustls::AlertDescription;
use rustls::pki_types::ServerName;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, Sleep, timeout};
use tokio_rustls::TlsConnector;

use super::error::RefusalBody;
use super::identity::DIRECTORY;
use super::server::{Hello, Join, Joined};
use super::wire::{Body, Wire, WireState};
use super::{
    Address, Error, Fingerprint, Identity, Limits, PROTOCOL, PROTOCOL_HEADER, Peer, PeerName,
    Peers, Result, Token, rekey, tls,
};

type BoxError = Box<dyn StdError + Send + Sync>;
type OutBody = UnsyncBoxBody<Bytes, BoxError>;

/// How long the driver of a broken connection may take to say why it broke. It takes microseconds.
const DRIVER_ENDS: Duration = Duration::from_millis(200);

/// A connection to an agent whose key was as expected, and which knows this host's key.
///
/// It does one thing at a time. After an error other than [`Error::Refused`] (and after a refusal
/// of a stream that was not sent to its end) it is closed, and every call fails with
/// [`Error::Closed`]; open another. Dropping it cuts it off.
pub struct Connection {
    sender: SendRequest<OutBody>,
    driver: AbortOnDrop,
    end: Arc<End>,
    address: Address,
    own: Fingerprint,
    peer_key: Option<Fingerprint>,
    /// For as long as it is there, the key with which this began is not replaced.
    key_in_use: Option<File>,
    local: SocketAddr,
    remote: SocketAddr,
    limits: Limits,
    hello: Option<Hello>,
}

/// Why the connection's driver ended, for those who only see that it did.
#[derive(Debug)]
struct End {
    error: OnceLock<Arc<hyper::Error>>,
    wire: Arc<WireState>,
}

/// Ends a task when it goes.
#[derive(Debug)]
pub(super) struct AbortOnDrop(pub AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("address", &self.address)
            .field("local", &self.local)
            .field("remote", &self.remote)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects, and makes sure of the other side: of its key, that it admits this host, and that
    /// it speaks the same version of the protocol.
    ///
    /// # Errors
    /// [`Error::Connect`], [`Error::Handshake`], [`Error::WrongHost`], [`Error::NotAdmitted`],
    /// [`Error::Protocol`], [`Error::TimedOut`], [`Error::Refused`] if it is overloaded.
    pub async fn open(
        address: &Address,
        expected: Fingerprint,
        identity: &Identity,
        limits: &Limits,
    ) -> Result<Connection> {
        Connection::open_to(address, vec![expected], identity, limits).await
    }

    /// The same to a host that may have any of these keys, the first of which it had last.
    pub(super) async fn open_to(
        address: &Address,
        expected: Vec<Fingerprint>,
        identity: &Identity,
        limits: &Limits,
    ) -> Result<Connection> {
        let tcp = timeout(
            limits.connect,
            TcpStream::connect((address.host(), address.port())),
        )
        .await
        .map_err(|_| Error::TimedOut {
            doing: "connecting",
            limit: "connect",
            after: limits.connect,
        })?;
        let connect = |source| Error::Connect {
            address: address.clone(),
            source,
        };
        let tcp = tcp.map_err(connect)?;
        let local = tcp.local_addr().map_err(connect)?;
        let remote = tcp.peer_addr().map_err(connect)?;
        let wire = Wire::new(tcp, limits).map_err(connect)?;
        let state = wire.state();

        let (config, pinned) = tls::client(identity, expected.clone())?;
        // No name is sent or checked; rustls wants one.
        let name = ServerName::IpAddress(remote.ip().into());
        let handshake = TlsConnector::from(config).connect(name, wire);
        let mut tls = match timeout(limits.handshake, handshake).await {
            Err(_) => {
                return Err(Error::TimedOut {
                    doing: "shaking hands",
                    limit: "handshake",
                    after: limits.handshake,
                });
            }
            Ok(Ok(tls)) => tls,
            Ok(Err(source)) => {
                return Err(match (pinned.other(), expected.first()) {
                    (Some(found), Some(&expected)) => Error::WrongHost {
                        address: address.clone(),
                        expected,
                        found,
                    },
                    _ => Error::Handshake {
                        address: address.clone(),
                        source,
                    },
                });
            }
        };
        let (wire, session) = tls.get_mut();
        session.set_buffer_limit(Some(limits.tls_buffer));
        wire.set_buffer(limits.tls_buffer);

        let doing = "starting to speak HTTP";
        let (sender, driver) = hyper::client::conn::http1::Builder::new()
            .max_header_size(limits.head)
            .max_headers(limits.header_lines)
            .max_buf_size(limits.read_buffer.max(limits.head).max(8192))
            .handshake(TokioIo::new(tls))
            .await
            .map_err(|source| Error::Lost { doing, source })?;
        let end = Arc::new(End {
            error: OnceLock::new(),
            wire: state,
        });
        let driver = tokio::spawn({
            let end = end.clone();
            async move {
                if let Err(error) = driver.await {
                    tracing::debug!(%error, "a connection ended early");
                    let _ = end.error.set(Arc::new(error));
                }
            }
        });
        let mut connection = Connection {
            sender,
            driver: AbortOnDrop(driver.abort_handle()),
            end,
            address: address.clone(),
            own: identity.fingerprint(),
            peer_key: pinned.found(),
            key_in_use: None,
            local,
            remote,
            limits: limits.clone(),
            hello: None,
        };
        // In TLS 1.3 the caller is done before the other side has looked at his certificate: only
        // an answer shows that it was accepted.
        let hello = connection
            .call_within(Method::GET, "/v1/hello", &(), limits.handshake)
            .await?;
        connection.hello = Some(hello);
        Ok(connection)
    }

    /// A connection to a peer, by whichever of its keys it has now, and with this host's. For as long as it
    /// is open this host's key is not replaced.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub(crate) async fn to_peer(
        address: &Address,
        peer: &Peer,
        state_dir: &Path,
        limits: &Limits,
    ) -> Result<Connection> {
        let key_in_use = rekey::key_in_use(&state_dir.join(DIRECTORY), limits).await?;
        let identity = Identity::load_or_create(state_dir)?;
        let peers = Peers::open(state_dir, limits)?;
        // It may have told of another one since.
        let known = peers.find(&peer.name)?;
        let known = known.filter(|known| known.lasting() == peer.lasting());
        let keys = known.as_ref().unwrap_or(peer).keys().collect();
        let mut connection = Connection::open_to(address, keys, &identity, limits).await?;
        connection.key_in_use = Some(key_in_use);
        if let Some(key) = connection.peer_key
            && known.is_some_and(|known| known.next == Some(key))
        {
            peers.used(key)?;
        }
        Ok(connection)
    }

    /// The address and port of this host on this connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The address and port of the agent on this connection.
    pub fn peer_addr(&self) -> SocketAddr {
        self.remote
    }

    /// What the agent calls itself.
    pub fn peer_name(&self) -> Option<&PeerName> {
        self.hello.as_ref().map(|hello| &hello.name)
    }

    /// The version of livemig that the agent runs.
    pub fn peer_version(&self) -> Option<&str> {
        self.hello.as_ref().map(|hello| hello.version.as_str())
    }

    /// What the agent calls this host; nothing if this host is not its peer and can only join.
    pub fn own_name(&self) -> Option<&PeerName> {
        self.hello.as_ref()?.you.as_ref()
    }

    /// Whether nothing more can be asked on it.
    pub fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    /// Sends JSON and receives JSON, within [`Limits::answer`].
    ///
    /// # Errors
    /// [`Error::Refused`] if the agent refused; [`Error::TimedOut`], [`Error::TooLarge`],
    /// [`Error::BadJson`], [`Error::Protocol`], [`Error::Lost`], [`Error::Closed`].
    pub async fn call<Ask, Answer>(
        &mut self,
        method: Method,
        path: &str,
        ask: &Ask,
    ) -> Result<Answer>
    where
        Ask: Serialize + ?Sized,
        Answer: DeserializeOwned,
    {
        self.call_within(method, path, ask, self.limits.answer)
            .await
    }

    /// The same, with a deadline of its own.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub async fn call_within<Ask, Answer>(
        &mut self,
        method: Method,
        path: &str,
        ask: &Ask,
        within: Duration,
    ) -> Result<Answer>
    where
        Ask: Serialize + ?Sized,
        Answer: DeserializeOwned,
    {
        let driver = self.driver.0.clone();
        let call = async {
            let response = self.ask(method, path, ask).await?;
            self.read(response).await
        };
        bounded(within, &driver, call).await
    }

    /// Sends JSON and receives a stream. Its head must come within [`Limits::answer`]; then the
    /// stream has only the stall time-out.
    ///
    /// The stream ends early if the connection is dropped. It must be read to its end before
    /// anything else is asked.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub async fn receive_stream<Ask>(
        &mut self,
        method: Method,
        path: &str,
        ask: &Ask,
    ) -> Result<(HeaderMap, Body)>
    where
        Ask: Serialize + ?Sized,
    {
        let (limits, driver) = (self.limits.clone(), self.driver.0.clone());
        let receive = async {
            let response = self.ask(method, path, ask).await?;
            let response = self.refuse(response).await?;
            let (head, body) = response.into_parts();
            Ok((head.headers, Body::new(body, &limits)))
        };
        bounded(limits.answer, &driver, receive).await
    }

    /// Sends a stream and receives JSON.
    ///
    /// Pieces are sent as they come; large ones (256 KiB and more) go fastest. While the stream
    /// runs, only the stall time-out applies, to the stream and to the connection alike;
    /// `answer_within` runs from its end. An agent may answer before it has read everything; if it
    /// refuses, that is what is reported.
    ///
    /// # Errors
    /// [`Error::Source`] if the stream failed; else as [`Connection::call`].
    pub async fn send_stream<S, E, Answer>(
        &mut self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        stream: S,
        answer_within: Duration,
    ) -> Result<Answer>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<BoxError>,
        Answer: DeserializeOwned,
    {
        let progress = Arc::new(Progress::default());
        let body = Outgoing {
            stream: Box::pin(stream),
            progress: progress.clone(),
            stall: self.limits.stall,
            timer: Box::pin(tokio::time::sleep(self.limits.stall)),
            waiting: false,
        };
        let result = {
            let progress = progress.clone();
            let exchange = async {
                let request = self.request(method, path, headers, body.boxed_unsync())?;
                let response = self.send(request).await?;
                self.read(response).await
            };
            let mut exchange = std::pin::pin!(exchange);
            tokio::select! {
                biased;
                result = &mut exchange => result,
                () = progress.ended() => timeout(answer_within, exchange)
                    .await
                    .unwrap_or(Err(Error::TimedOut {
                        doing: "waiting for the answer to a stream",
                        limit: "answer_within",
                        after: answer_within,
                    })),
            }
        };
        if !progress.is_ended() || matches!(result, Err(Error::TimedOut { .. })) {
            // Whatever else would be sent on it would follow the middle of a stream.
            self.close();
        }
        match result {
            // A refusal explains everything. Else, if the stream failed, the rest is consequence.
            Err(error) if !matches!(error, Error::Refused { .. } | Error::Protocol { .. }) => {
                Err(progress.take_failure().unwrap_or(error))
            }
            result => result,
        }
    }

    /// Sends a stream and receives one at the same time, for as long as either lasts. The head of the answer
    /// must come within [`Limits::answer`]; then both have only the stall time-out.
    ///
    /// Nothing else can be asked on this connection any more.
    ///
    /// # Errors
    /// As [`Connection::call`].
    pub async fn exchange<S, E>(&mut self, method: Method, path: &str, stream: S) -> Result<Body>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<BoxError>,
    {
        let body = Outgoing {
            stream: Box::pin(stream),
            progress: Arc::new(Progress::default()),
            stall: self.limits.stall,
            timer: Box::pin(tokio::time::sleep(self.limits.stall)),
            waiting: false,
        };
        let (limits, driver) = (self.limits.clone(), self.driver.0.clone());
        let exchange = async {
            let request = self.request(method, path, HeaderMap::new(), body.boxed_unsync())?;
            let response = self.send(request).await?;
            let response = self.refuse(response).await?;
            Ok(Body::new(response.into_body(), &self.limits))
        };
        bounded(limits.answer, &driver, exchange).await
    }

    fn close(&mut self) {
        self.driver.0.abort();
    }

    async fn ask<Ask: Serialize + ?Sized>(
        &mut self,
        method: Method,
        path: &str,
        ask: &Ask,
    ) -> Result<Response<Incoming>> {
        let what = "the body of a request";
        let content = match method {
            Method::GET | Method::HEAD | Method::DELETE => Vec::new(),
            _ => serde_json::to_vec(ask).map_err(|source| Error::BadJson { what, source })?,
        };
        if content.len() > self.limits.json {
            return Err(Error::TooLarge {
                what,
                limit: "json",
                bytes: self.limits.json,
            });
        }
        let mut headers = HeaderMap::new();
        if !content.is_empty() {
            headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        }
        let body = Full::new(Bytes::from(content))
            .map_err(|never| match never {})
            .boxed_unsync();
        let request = self.request(method, path, headers, body)?;
        self.send(request).await
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: OutBody,
    ) -> Result<Request<OutBody>> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .body(body)
            .map_err(Error::BadRequest)?;
        *request.headers_mut() = headers;
        let host = HeaderValue::try_from(self.address.to_string())
            .map_err(|error| Error::BadRequest(error.into()))?;
        request.headers_mut().insert(HOST, host);
        request
            .headers_mut()
            .insert(PROTOCOL_HEADER, HeaderValue::from(PROTOCOL));
        Ok(request)
    }

    async fn send(&mut self, request: Request<OutBody>) -> Result<Response<Incoming>> {
        if let Err(error) = self.sender.ready().await {
            return Err(self.broken("waiting to send a request", error).await);
        }
        let response = match self.sender.send_request(request).await {
            Ok(response) => response,
            Err(error) => return Err(self.broken("sending a request", error).await),
        };
        match response.headers().get(PROTOCOL_HEADER) {
            Some(value) if value.as_bytes() == PROTOCOL.to_string().as_bytes() => Ok(response),
            theirs => Err(Error::Protocol {
                who: self.address.to_string(),
                ours: PROTOCOL,
                theirs: theirs.map_or("none".into(), |value| {
                    String::from_utf8_lossy(value.as_bytes()).into_owned()
                }),
            }),
        }
    }

    /// Turns an answer that is a refusal into an error.
    async fn refuse(&self, response: Response<Incoming>) -> Result<Response<Incoming>> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body: Result<RefusalBody> = Body::new(response.into_body(), &self.limits).json().await;
        Err(match body {
            Ok(body) => Error::Refused {
                code: body.code,
                message: body.message,
                hint: body.hint,
                status: status.as_u16(),
            },
            Err(error) => {
                tracing::debug!(%error, "a refusal cannot be understood");
                Error::Refused {
                    code: "unexplained".into(),
                    message: format!("{} answered {status} and no explanation", self.address),
                    hint: None,
                    status: status.as_u16(),
                }
            }
        })
    }

    async fn read<Answer: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<Answer> {
        let response = self.refuse(response).await?;
        Body::new(response.into_body(), &self.limits).json().await
    }

    /// Finds out what it means that hyper failed.
    async fn broken(&self, doing: &'static str, error: hyper::Error) -> Error {
        // A driver that ends drops its side of the connection a moment before it says why.
        let ended = async {
            while !self.driver.0.is_finished() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let _ = timeout(DRIVER_ENDS, ended).await;
        if self.end.wire.stalled() {
            return Error::TimedOut {
                doing: "waiting for the other side to take what was sent",
                limit: "stall",
                after: self.limits.stall,
            };
        }
        // The driver may know better why it ended than the one who waited for it.
        let end = self.end.error.get();
        let alert = alert(&error).or_else(|| end.and_then(|end| alert(end.as_ref())));
        match alert {
            // What rustls sends for a key that its verifier refuses, and for none.
            Some(AlertDescription::AccessDenied | AlertDescription::CertificateRequired) => {
                return Error::NotAdmitted {
                    address: self.address.clone(),
                    own: self.own,
                };
            }
            Some(other) => {
                return Error::Handshake {
                    address: self.address.clone(),
                    source: std::io::Error::other(rustls::Error::AlertReceived(other)),
                };
            }
            None => {}
        }
        if error.is_closed() || (error.is_canceled() && self.hello.is_some()) {
            return Error::Closed;
        }
        Error::Lost {
            doing,
            source: error,
        }
    }
}

/// Gives up, and cuts off the connection, when it takes too long: it is in the middle of something.
async fn bounded<T>(
    limit: Duration,
    driver: &AbortHandle,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    timeout(limit, work).await.unwrap_or_else(|_| {
        driver.abort();
        Err(Error::TimedOut {
            doing: "waiting for an answer",
            limit: "answer",
            after: limit,
        })
    })
}

/// The TLS alert at the bottom of an error, if one is there.
fn alert(error: &(dyn StdError + 'static)) -> Option<AlertDescription> {
    let mut next = Some(error);
    while let Some(error) = next {
        let tls = error.downcast_ref::<rustls::Error>().or_else(|| {
            let io = error.downcast_ref::<std::io::Error>()?;
            io.get_ref()?.downcast_ref::<rustls::Error>()
        });
        if let Some(rustls::Error::AlertReceived(alert)) = tls {
            return Some(*alert);
        }
        next = error.source();
    }
    None
}

/// How far a stream has come, for the one who waits for its answer.
#[derive(Debug, Default)]
struct Progress {
    state: Mutex<(bool, Option<Error>)>,
    changed: Notify,
}

impl Progress {
    fn lock(&self) -> std::sync::MutexGuard<'_, (bool, Option<Error>)> {
        // Nothing that could panic is done while it is locked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self) {
        self.lock().0 = true;
        self.changed.notify_one();
    }

    fn fail(&self, error: Error) {
        self.lock().1 = Some(error);
    }

    fn is_ended(&self) -> bool {
        self.lock().0
    }

    fn take_failure(&self) -> Option<Error> {
        self.lock().1.take()
    }

    /// Waits for the end of the stream, not for a failure: that ends the exchange itself.
    async fn ended(&self) {
        while !self.is_ended() {
            self.changed.notified().await;
        }
    }
}

/// A stream as the body of a request.
struct Outgoing<S> {
    stream: Pin<Box<S>>,
    progress: Arc<Progress>,
    stall: Duration,
    timer: Pin<Box<Sleep>>,
    /// Whether the timer runs: it does while the stream has nothing to give.
    waiting: bool,
}

impl<S, E> hyper::body::Body for Outgoing<S>
where
    S: Stream<Item = Result<Bytes, E>>,
    E: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        match this.stream.as_mut().poll_next(cx) {
            Poll::Ready(Some(Ok(piece))) => {
                this.waiting = false;
                Poll::Ready(Some(Ok(Frame::data(piece))))
            }
            Poll::Ready(Some(Err(error))) => {
                this.progress.fail(Error::Source(error.into()));
                Poll::Ready(Some(Err("the stream broke off".into())))
            }
            Poll::Ready(None) => {
                this.progress.end();
                Poll::Ready(None)
            }
            Poll::Pending => {
                if !this.waiting {
                    this.waiting = true;
                    this.timer.as_mut().reset(Instant::now() + this.stall);
                }
                ready!(this.timer.as_mut().poll(cx));
                this.progress.fail(Error::TimedOut {
                    doing: "waiting for more of the stream to send",
                    limit: "stall",
                    after: this.stall,
                });
                Poll::Ready(Some(Err("the stream stalled".into())))
            }
        }
    }
}

/// How a host introduces itself when it joins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinAs {
    /// What it calls itself, and is to be called there.
    pub name: PeerName,
    /// Where its own agent listens, if it has one.
    pub address: Option<Address>,
    /// What it will call the inviting host; nothing for what that calls itself.
    pub call_it: Option<PeerName>,
}

/// Makes this host and the one that invited it known to each other.
///
/// # Errors
/// [`Error::TokenExpired`], [`Error::OwnToken`]; [`Error::NameTaken`], [`Error::KnownAs`] if the
/// inviting host cannot be recorded here (the token is not used up then); [`Error::Refused`] with
/// the code `not-invited`, `invite-expired`, `name-taken`, `known-by-other-name` or
/// `too-many-peers`; [`Error::NotAdmitted`] if no invitation at all is open there; else as
/// [`Connection::open`].
pub async fn join(
    token: &Token,
    own: &JoinAs,
    identity: &Identity,
    peers: &Peers,
    limits: &Limits,
) -> Result<Peer> {
    // The other host shall not get to know a key that is about to go.
    let _key_in_use = rekey::key_in_use(identity.directory(), limits).await?;
    let newer = identity.successor()?;
    let identity = newer.as_ref().unwrap_or(identity);
    let offer = &token.offer;
    if offer.fingerprint == identity.fingerprint() {
        return Err(Error::OwnToken);
    }
    if let Some(ago) = token.expired(SystemTime::now()) {
        return Err(Error::TokenExpired { ago });
    }
    let name = own.call_it.clone().unwrap_or_else(|| offer.name.clone());
    peers.check(&name, offer.fingerprint)?;
    let mut connection =
        Connection::open(&offer.address, offer.fingerprint, identity, limits).await?;
    let ask = Join {
        secret: token.secret.clone(),
        name: own.name.clone(),
        address: own.address.clone(),
    };
    let Joined { name: _ } = connection.call(Method::POST, "/v1/join", &ask).await?;
    peers.add(&Peer::new(
        name,
        Some(offer.address.clone()),
        offer.fingerprint,
    ))
}
