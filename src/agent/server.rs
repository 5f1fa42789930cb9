//! The agent's side: who is let in, and how much of them.
//!
//! A connection goes through two rooms. In the first are those who have not proved who they are;
//! it is small, and when it is full, one more pushes out the oldest of the address that has most
//! connections in it. So nobody can keep a peer out by opening connections and saying nothing:
//! he pushes out his own, and a peer needs the room for two round trips only. In the second are
//! peers; there are so many places, and so many for each.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{Stream, TryStreamExt};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::wire::{Body, HeadState, Heads, Wire};
use super::{
    Address, Error, Fingerprint, Identity, Invites, Limits, PROTOCOL, PROTOCOL_HEADER, Peer,
    PeerName, Peers, Refusal, Result, Secret, store, tls,
};

/// What a host knows of itself and of others.
#[derive(Debug, Clone)]
pub struct Trust {
    /// What this host calls itself.
    pub name: PeerName,
    /// Its key.
    pub identity: Identity,
    /// The hosts that it knows.
    pub peers: Peers,
    /// The hosts that it would come to know.
    pub invites: Invites,
}

impl Trust {
    /// Opens what is under a state directory, and creates what is not there yet.
    ///
    /// # Errors
    /// As [`Identity::load_or_create`], [`Peers::open`] and [`Invites::open`].
    pub fn open(state_dir: &Path, name: PeerName, limits: &Limits) -> Result<Trust> {
        Ok(Trust {
            name,
            identity: Identity::load_or_create(state_dir)?,
            peers: Peers::open(state_dir, limits)?,
            invites: Invites::open(state_dir, limits)?,
        })
    }
}

/// The body of an answer.
pub type ReplyBody = UnsyncBoxBody<Bytes, Box<dyn std::error::Error + Send + Sync>>;

/// What a handler answers.
pub type Reply = Result<Response<ReplyBody>, Refusal>;

/// Answers of the usual kinds.
pub mod reply {
    use super::*;

    /// Status 200 and a JSON body.
    ///
    /// # Errors
    /// A [`Refusal`] with the code `internal` if the value cannot be written as JSON.
    pub fn json<T: Serialize + ?Sized>(value: &T) -> Reply {
        with_status(StatusCode::OK, value)
    }

    /// Status 200 and whatever comes out of a stream. If the stream fails, the connection breaks.
    pub fn stream<S, E>(stream: S) -> Response<ReplyBody>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let frames = stream.map_ok(Frame::data).map_err(Into::into);
        Response::new(StreamBody::new(frames).boxed_unsync())
    }

    /// The same for a request whose body goes on while it is answered. Nothing else can be asked on the
    /// connection: what comes on it is the body, and no head that has to be there in time.
    pub fn exchange<S, E>(stream: S) -> Response<ReplyBody>
    where
        S: Stream<Item = Result<Bytes, E>> + Send + 'static,
        E: Into<Box<dyn std::error::Error + Send + Sync>> + 'static,
    {
        let mut response = self::stream(stream);
        response.extensions_mut().insert(GoesOn);
        response
    }

    /// The mark of an answer to a request that goes on.
    #[derive(Debug, Clone, Copy)]
    pub(super) struct GoesOn;

    pub(super) fn with_status<T: Serialize + ?Sized>(status: StatusCode, value: &T) -> Reply {
        let content = serde_json::to_vec(value).map_err(|error| {
            tracing::error!(%error, "an answer cannot be written as JSON");
            Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "the agent failed; its log says why",
            )
        })?;
        let body = Full::new(Bytes::from(content)).map_err(|never| match never {});
        let mut response = Response::new(body.boxed_unsync());
        *response.status_mut() = status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }
}

/// Who sent a request.
#[derive(Debug, Clone)]
pub struct Caller {
    /// The peer, as it is known at this moment.
    pub peer: Peer,
    /// The address and port of this host at which it called.
    pub local: SocketAddr,
    /// The address and port from which it called.
    pub remote: SocketAddr,
}

/// What requests mean. Only those of peers reach it.
///
/// The returned future runs as a task of its own: it goes on when the caller goes away (it notices
/// that by its body failing, if it reads one), so it is never cut off half-way between two steps.
/// If it panics, the caller gets `internal` with status 500, and the agent goes on. It ends with
/// the agent, after [`Limits::drain`].
pub trait Handler: Send + Sync + 'static {
    /// Answers one request.
    fn handle(self: Arc<Self>, caller: Caller, request: Request<Body>)
    -> BoxFuture<'static, Reply>;
}

/// What an agent has to do at a moment, and has done so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// Connections at this moment that have not proved to be a peer's.
    pub handshakes: usize,
    /// The most there ever were at one time.
    pub handshakes_peak: usize,
    /// Connections of peers at this moment.
    pub connections: usize,
    /// The most there ever were at one time.
    pub connections_peak: usize,
    /// Requests in work at this moment.
    pub requests: usize,
    /// The most tasks that there ever were for connections at one time.
    pub tasks_peak: usize,
    /// Connections accepted so far.
    pub accepted: u64,
    /// Times so far that a connection could not be accepted, as for lack of file descriptors.
    pub not_accepted: u64,
    /// Handshakes so far that failed, be it that the key was unknown.
    pub refused: u64,
    /// Handshakes so far that were cut off because there were too many.
    pub pushed_out: u64,
    /// Handshakes so far that took too long.
    pub timed_out: u64,
}

/// An agent that listens.
pub struct Server {
    listener: TcpListener,
    shared: Arc<Shared>,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("listener", &self.listener)
            .field("name", &self.shared.trust.name)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Starts to listen. Nobody is served before [`Server::serve`].
    ///
    /// # Errors
    /// [`Error::Listen`] if the address is in use or not one of this host, [`Error::TlsSetup`].
    pub async fn bind(address: SocketAddr, trust: Trust, limits: Limits) -> Result<Server> {
        let tls = tls::server(&trust.identity, trust.peers.clone(), trust.invites.clone())?;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| Error::Listen { address, source })?;
        Ok(Server {
            listener,
            shared: Arc::new(Shared {
                tls,
                strangers: Strangers::new(limits.handshakes),
                places: Places::new(limits.connections, limits.connections_per_peer),
                requests: Arc::new(Semaphore::new(limits.requests)),
                tally: Tally::default(),
                stop: CancellationToken::new(),
                trust,
                limits,
            }),
        })
    }

    /// Where it listens: with the port that the kernel chose, if it was to choose.
    ///
    /// # Errors
    /// [`Error::Listen`] if the kernel does not say.
    pub fn local_addr(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(|source| Error::Listen {
            address: SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
            source,
        })
    }

    /// Gives the counters, also while it serves.
    pub fn counters(&self) -> impl Fn() -> Counters + Send + Sync + use<> {
        let shared = self.shared.clone();
        move || shared.counters()
    }

    /// Serves until `shutdown` is ready, then waits for requests in work for [`Limits::drain`].
    pub async fn serve(self, handler: Arc<dyn Handler>, shutdown: impl Future<Output = ()>) {
        let Server { listener, shared } = self;
        let mut shutdown = std::pin::pin!(shutdown);
        let mut tasks = JoinSet::new();
        // A connection that was pushed out is a task until it is next scheduled; some room for
        // those. When even that is full, accepting waits for them.
        let most = shared.limits.connections + shared.limits.handshakes + 8;
        let mut pause = Duration::ZERO;
        loop {
            let accept = async {
                tokio::time::sleep(pause).await;
                listener.accept().await
            };
            tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(_) = tasks.join_next(), if !tasks.is_empty() => {}
                accepted = accept, if tasks.len() < most => match accepted {
                    Ok((tcp, remote)) => {
                        pause = Duration::ZERO;
                        shared.tally.accepted.fetch_add(1, Ordering::Relaxed);
                        let place = shared.strangers.enter(remote.ip(), &shared.tally);
                        tasks.spawn(connection(shared.clone(), handler.clone(), tcp, remote, place));
                        shared.tally.tasks_peak.fetch_max(tasks.len(), Ordering::Relaxed);
                    }
                    // accept(2) also reports what happened to the one connection (ECONNABORTED and
                    // the like): on with the next. Out of descriptors or memory: it would fail
                    // again at once, until something is given back.
                    Err(error) => {
                        shared.tally.not_accepted.fetch_add(1, Ordering::Relaxed);
                        tracing::warn!(%error, "could not accept a connection");
                        pause = (pause * 2).clamp(Duration::from_millis(5), Duration::from_secs(1));
                    }
                },
            }
        }
        drop(listener);
        shared.stop.cancel();
        let drained = async {
            while tasks.join_next().await.is_some() {}
            // Handlers whose callers have gone are tasks of their own.
            let _ = shared
                .requests
                .acquire_many(u32::try_from(shared.limits.requests).unwrap_or(u32::MAX))
                .await;
        };
        if timeout(shared.limits.drain, drained).await.is_err() {
            tracing::warn!("stopped with requests in work");
        }
        tasks.shutdown().await;
    }
}

struct Shared {
    trust: Trust,
    limits: Limits,
    tls: Arc<ServerConfig>,
    strangers: Arc<Strangers>,
    places: Arc<Places>,
    requests: Arc<Semaphore>,
    tally: Tally,
    stop: CancellationToken,
}

/// What is counted but not held.
#[derive(Debug, Default)]
struct Tally {
    handshakes_peak: AtomicUsize,
    tasks_peak: AtomicUsize,
    accepted: AtomicU64,
    not_accepted: AtomicU64,
    refused: AtomicU64,
    pushed_out: AtomicU64,
    timed_out: AtomicU64,
}

impl Shared {
    fn counters(&self) -> Counters {
        let tally = &self.tally;
        let places = self.places.lock();
        Counters {
            handshakes: self.strangers.lock().len(),
            handshakes_peak: tally.handshakes_peak.load(Ordering::Relaxed),
            connections: places.taken,
            connections_peak: places.peak,
            requests: self.limits.requests - self.requests.available_permits(),
            tasks_peak: tally.tasks_peak.load(Ordering::Relaxed),
            accepted: tally.accepted.load(Ordering::Relaxed),
            not_accepted: tally.not_accepted.load(Ordering::Relaxed),
            refused: tally.refused.load(Ordering::Relaxed),
            pushed_out: tally.pushed_out.load(Ordering::Relaxed),
            timed_out: tally.timed_out.load(Ordering::Relaxed),
        }
    }
}

/// The first room: connections that have not proved to be a peer's.
#[derive(Debug)]
struct Strangers {
    limit: usize,
    /// Oldest first.
    waiting: Mutex<Vec<Stranger>>,
}

#[derive(Debug)]
struct Stranger {
    source: IpAddr,
    out: CancellationToken,
}

/// A place in the first room, free again when it is dropped.
#[derive(Debug)]
struct StrangerPlace {
    room: Arc<Strangers>,
    out: CancellationToken,
}

impl Strangers {
    fn new(limit: usize) -> Arc<Strangers> {
        Arc::new(Strangers {
            limit: limit.max(1),
            waiting: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Stranger>> {
        // Nothing that could panic is done while it is locked.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(self: &Arc<Self>, from: IpAddr, tally: &Tally) -> StrangerPlace {
        let source = network(from);
        let out = CancellationToken::new();
        let mut waiting = self.lock();
        if waiting.len() >= self.limit {
            let mut of: HashMap<IpAddr, usize> = HashMap::new();
            for stranger in waiting.iter() {
                *of.entry(stranger.source).or_default() += 1;
            }
            let most = of.values().copied().max().unwrap_or(0);
            if let Some(oldest) = waiting
                .iter()
                .position(|s| of.get(&s.source) == Some(&most))
            {
                waiting.remove(oldest).out.cancel();
                tally.pushed_out.fetch_add(1, Ordering::Relaxed);
            }
        }
        waiting.push(Stranger {
            source,
            out: out.clone(),
        });
        tally
            .handshakes_peak
            .fetch_max(waiting.len(), Ordering::Relaxed);
        StrangerPlace {
            room: self.clone(),
            out,
        }
    }
}

/// What one host can have many of: an IPv6 host has a /64 to itself (RFC 6177).
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

impl Drop for StrangerPlace {
    fn drop(&mut self) {
        // A token equals no other by value; one that was cancelled is not in the list any more.
        if !self.out.is_cancelled() {
            self.out.cancel();
            self.room.lock().retain(|s| !s.out.is_cancelled());
        }
    }
}

/// The second room: connections of peers.
#[derive(Debug)]
struct Places {
    limit: usize,
    each: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    of: HashMap<Fingerprint, usize>,
    taken: usize,
    peak: usize,
}

/// A place in the second room, free again when it is dropped.
#[derive(Debug)]
struct Place {
    room: Arc<Places>,
    whose: Fingerprint,
}

impl Places {
    fn new(limit: usize, each: usize) -> Arc<Places> {
        Arc::new(Places {
            limit,
            each,
            taken: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        // Nothing that could panic is done while it is locked.
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(self: &Arc<Self>, whose: Fingerprint) -> Result<Place, Refusal> {
        let mut room = self.lock();
        let own = room.of.get(&whose).copied().unwrap_or(0);
        let (full, limit, of) = if own >= self.each {
            (true, self.each, "from one host (connections_per_peer)")
        } else {
            (room.taken >= self.limit, self.limit, "(connections)")
        };
        if full {
            return Err(Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too-many-connections",
                format!("the agent serves {limit} connections {of}, which is the limit"),
            )
            .with_hint("try again when other migrations have ended"));
        }
        room.of.insert(whose, own + 1);
        room.taken += 1;
        room.peak = room.peak.max(room.taken);
        drop(room);
        Ok(Place {
            room: self.clone(),
            whose,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut room = self.room.lock();
        room.taken -= 1;
        if let Some(own) = room.of.get_mut(&self.whose) {
            *own -= 1;
            if *own == 0 {
                room.of.remove(&self.whose);
            }
        }
    }
}

/// A connection from its first byte to its last.
async fn connection(
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
    tcp: TcpStream,
    remote: SocketAddr,
    place: StrangerPlace,
) {
    let out = place.out.clone();
    let stranger = async {
        let entered = timeout(shared.limits.handshake, handshake(&shared, tcp, remote)).await;
        let (tls, fingerprint, local) = match entered {
            Ok(entered) => entered?,
            Err(_) => {
                shared.tally.timed_out.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(%remote, "a handshake took too long");
                return None;
            }
        };
        let mut visit = Visit {
            shared: shared.clone(),
            handler,
            fingerprint,
            local,
            remote,
            busy: None,
            head: Arc::default(),
        };
        let known = matches!(shared.trust.peers.by_fingerprint(fingerprint), Ok(Some(_)));
        match known.then(|| shared.places.take(fingerprint)) {
            Some(Ok(own)) => return Some((visit, tls, own)),
            Some(Err(busy)) => visit.busy = Some(busy),
            None => {}
        }
        // Whoever may only join, or hear that there is no place, stays in the first room.
        if timeout(shared.limits.join_time, visit.serve(tls))
            .await
            .is_err()
        {
            tracing::debug!(%remote, "a caller who may only join stayed for too long");
        }
        None
    };
    let entered = tokio::select! {
        biased;
        () = out.cancelled() => None,
        () = shared.stop.cancelled() => None,
        entered = stranger => entered,
    };
    drop(place);
    if let Some((visit, tls, _own)) = entered {
        visit.serve(tls).await;
    }
}

async fn handshake(
    shared: &Shared,
    tcp: TcpStream,
    remote: SocketAddr,
) -> Option<(TlsStream<Wire>, Fingerprint, SocketAddr)> {
    let local = tcp.local_addr().ok()?;
    let wire = Wire::new(tcp, &shared.limits).ok()?;
    let accept = TlsAcceptor::from(shared.tls.clone()).accept(wire);
    let mut tls = match accept.into_fallible().await {
        Ok(tls) => tls,
        Err((error, mut wire)) => {
            shared.tally.refused.fetch_add(1, Ordering::Relaxed);
            tracing::debug!(%remote, %error, "a handshake failed");
            // So that the caller reads the alert instead of a reset.
            let _ = wire.shutdown().await;
            return None;
        }
    };
    let (wire, session) = tls.get_mut();
    let certificate = session.peer_certificates()?.first()?;
    let fingerprint = Fingerprint::of_certificate(certificate).ok()?;
    session.set_buffer_limit(Some(shared.limits.tls_buffer));
    wire.set_buffer(shared.limits.tls_buffer);
    Some((tls, fingerprint, local))
}

/// One connection whose caller has shown a key.
#[derive(Clone)]
struct Visit {
    shared: Arc<Shared>,
    handler: Arc<dyn Handler>,
    fingerprint: Fingerprint,
    local: SocketAddr,
    remote: SocketAddr,
    /// There is no place for it: this is what every request gets.
    busy: Option<Refusal>,
    head: Arc<HeadState>,
}

impl Visit {
    async fn serve(self, tls: TlsStream<Wire>) {
        let limits = self.shared.limits.clone();
        let (stop, remote) = (self.shared.stop.clone(), self.remote);
        let io = Heads::new(tls, self.head.clone(), limits.head_time);
        let service = hyper::service::service_fn(move |request| self.clone().answer(request));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.idle)
            .max_header_size(limits.head)
            .max_headers(limits.header_lines)
            // hyper wants 8 KiB at least.
            .max_buf_size(limits.read_buffer.max(limits.head).max(8192))
            .serve_connection(TokioIo::new(io), service);
        let mut connection = std::pin::pin!(connection);
        let result = tokio::select! {
            result = &mut connection => result,
            () = stop.cancelled() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(error) = result {
            tracing::debug!(%remote, %error, "a connection ended early");
        }
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<ReplyBody>, Infallible> {
        let head = self.head.clone();
        head.begin();
        let path = request.uri().path().to_owned();
        let remote = self.remote;
        let reply = match self.route(request).await {
            Ok(response) => Ok(response),
            Err(refusal) => {
                tracing::debug!(%remote, path, %refusal, "refused a request");
                reply::with_status(refusal.status, &refusal.body())
            }
        };
        let mut response = reply.unwrap_or_else(|_| {
            // Three strings can be written as JSON.
            let mut response = Response::new(ReplyBody::default());
            *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
            response
        });
        response
            .headers_mut()
            .insert(PROTOCOL_HEADER, HeaderValue::from(PROTOCOL));
        if response.extensions().get::<reply::GoesOn>().is_none() {
            head.end();
        }
        Ok(response)
    }

    async fn route(self, request: Request<Incoming>) -> Reply {
        check_protocol(&request)?;
        if let Some(busy) = self.busy {
            return Err(busy);
        }
        let Visit {
            shared, handler, ..
        } = self;
        // Looked up anew for each request: what was taken from a peer is gone at once.
        let peer = peer_with(&shared.trust, self.fingerprint).await?;
        let (head, body) = request.into_parts();
        let body = Body::new(body, &shared.limits);
        match (&head.method, head.uri.path()) {
            (&Method::GET, "/v1/hello") => {
                return reply::json(&Hello {
                    name: shared.trust.name.clone(),
                    version: env!("CARGO_PKG_VERSION").to_owned(),
                    you: peer.map(|peer| peer.name),
                });
            }
            (&Method::POST, "/v1/join") => {
                let ask: Join = body.json_up_to(shared.limits.join, "join").await?;
                return admit(&shared.trust, self.fingerprint, ask).await;
            }
            (&Method::POST, "/v1/key") => {
                let ask: NextKey = body.json_up_to(shared.limits.join, "key").await?;
                return will_have(&shared.trust, self.fingerprint, ask).await;
            }
            _ => {}
        }
        let Some(peer) = peer else {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "not-a-peer",
                "this host is not known here and can only join",
            )
            .with_hint("make the hosts known to each other: `livemig invite` there, `livemig join TOKEN` here"));
        };
        let Ok(permit) = shared.requests.clone().try_acquire_owned() else {
            return Err(Refusal::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "too-many-requests",
                format!(
                    "the agent works on {} requests, which is the limit (requests)",
                    shared.limits.requests
                ),
            ));
        };
        let caller = Caller {
            peer,
            local: self.local,
            remote: self.remote,
        };
        let request = Request::from_parts(head, body);
        let work = tokio::spawn(async move {
            let reply = handler.handle(caller, request).await;
            drop(permit);
            reply
        });
        work.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a request was not worked out to its end");
            Err(Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "the agent failed; its log says why",
            ))
        })
    }
}

fn check_protocol(request: &Request<Incoming>) -> Result<(), Refusal> {
    let theirs = match request.headers().get(PROTOCOL_HEADER) {
        None => "none".into(),
        Some(value) if value.as_bytes() == PROTOCOL.to_string().as_bytes() => return Ok(()),
        Some(value) => String::from_utf8_lossy(value.as_bytes()).into_owned(),
    };
    Err(Refusal::new(
        StatusCode::BAD_REQUEST,
        "protocol-mismatch",
        format!("the caller speaks version {theirs} of the protocol, this agent speaks version {PROTOCOL}"),
    )
    .with_hint("install the same version of livemig on both hosts"))
}

/// What an agent says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    /// What it calls itself.
    pub(super) name: PeerName,
    /// The version of livemig that it runs.
    pub(super) version: String,
    /// What it calls the caller, if that is a peer.
    pub(super) you: Option<PeerName>,
}

/// What a host sends that was invited.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) secret: Secret,
    pub(super) name: PeerName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) address: Option<Address>,
}

/// What it is answered.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Joined {
    /// What the inviting host calls itself.
    pub(super) name: PeerName,
}

/// What a host sends that is about to have another key, while it has the one that is known.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct NextKey {
    pub(super) next: Fingerprint,
}

/// The peer that has shown this key. The first use of a new one ends the old one.
async fn peer_with(trust: &Trust, key: Fingerprint) -> Result<Option<Peer>, Refusal> {
    let peer = trust.peers.by_fingerprint(key)?;
    if peer.as_ref().is_none_or(|peer| peer.next != Some(key)) {
        return Ok(peer);
    }
    let peers = trust.peers.clone();
    blocking(move || {
        peers.used(key)?;
        peers.by_fingerprint(key)
    })
    .await
}

/// A peer says by which key it will be known.
async fn will_have(trust: &Trust, key: Fingerprint, ask: NextKey) -> Reply {
    let trust = trust.clone();
    let own = trust.name.clone();
    let peer = blocking(move || {
        if trust.identity.fingerprint() == ask.next {
            return Err(Error::KnownAs {
                name: trust.name,
                fingerprint: ask.next,
            });
        }
        trust.peers.will_have(key, ask.next)
    })
    .await?;
    tracing::info!(name = %peer.name, next = %ask.next, "a host is about to have another key");
    reply::json(&Joined { name: own })
}

/// Work on files that are written and synced.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => {
            tracing::error!(%error, "a request was not worked out to its end");
            Err(Refusal::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "internal",
                "the agent failed; its log says why",
            ))
        }
    }
}

/// Makes a caller a peer, if he was invited.
async fn admit(trust: &Trust, fingerprint: Fingerprint, ask: Join) -> Reply {
    let (trust, name) = (trust.clone(), ask.name.clone());
    let own = blocking(move || {
        // Nor does this host's key go while another gets to know it: that takes the invitation with it.
        let _key_in_use = store::lock_shared_waiting(trust.identity.directory())?;
        trust.invites.check(&ask.secret)?;
        // Asked before the invitation is used up, so that it can be tried again by another name.
        trust.peers.check(&ask.name, fingerprint)?;
        trust.invites.redeem(&ask.secret)?;
        trust
            .peers
            .add(&Peer::new(ask.name, ask.address, fingerprint))?;
        Ok(trust.name)
    })
    .await?;
    tracing::info!(%name, %fingerprint, "a host has joined");
    reply::json(&Joined { name: own })
}
