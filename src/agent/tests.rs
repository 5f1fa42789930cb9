//! An agent and those who call it, on loopback: peers, strangers and vandals.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt, Stream, StreamExt, stream};
use hyper::{HeaderMap, Method, Request, StatusCode};
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::sync::CancellationToken;

use super::*;

/// What the handlers of these tests do.
#[derive(Default)]
struct Desk {
    /// Requests that were worked out to their end.
    done: AtomicUsize,
}

impl Handler for Desk {
    fn handle(
        self: Arc<Self>,
        caller: Caller,
        request: Request<Body>,
    ) -> BoxFuture<'static, Reply> {
        async move {
            let (head, mut body) = request.into_parts();
            let reply = match head.uri.path() {
                "/v1/who" => reply::json(&json!({
                    "name": caller.peer.name,
                    "local": caller.local,
                    "remote": caller.remote,
                })),
                "/v1/echo" => reply::json(&body.json::<Value>().await?),
                "/v1/count" => {
                    let (mut bytes, mut hash) = (0, blake3::Hasher::new());
                    while let Some(piece) = body.next().await {
                        let piece = piece?;
                        bytes += piece.len();
                        hash.update(&piece);
                    }
                    let digest = hash.finalize().to_string();
                    let header = head.headers.get("livemig-test").map(|v| v.len());
                    reply::json(&json!({"bytes": bytes, "digest": digest, "header": header}))
                }
                "/v1/discard" => {
                    let mut bytes = 0;
                    while let Some(piece) = body.next().await {
                        bytes += piece?.len();
                    }
                    reply::json(&bytes)
                }
                "/v1/refuse" => {
                    let _ = body.next().await;
                    Err(
                        Refusal::new(StatusCode::CONFLICT, "no-room", "there is no room")
                            .with_hint("make some"),
                    )
                }
                "/v1/swallow" => {
                    std::future::pending::<()>().await;
                    drop(body);
                    unreachable!()
                }
                "/v1/slow" => {
                    while body.next().await.is_some() {}
                    std::future::pending().await
                }
                "/v1/later" => {
                    while body.next().await.is_some() {}
                    tokio::task::yield_now().await;
                    reply::json(&"later")
                }
                "/v1/numbers" => {
                    let numbers = (0..64u8).map(|n| Ok::<_, Error>(vec![n; 100_000].into()));
                    Ok(reply::stream(stream::iter(numbers)))
                }
                "/v1/back" => Ok(reply::exchange(body)),
                "/v1/panic" => panic!("this is what the test wants"),
                other => Err(Refusal::new(
                    StatusCode::NOT_FOUND,
                    "no-such-request",
                    other,
                )),
            };
            self.done.fetch_add(1, Ordering::SeqCst);
            reply
        }
        .boxed()
    }
}

fn name(name: &str) -> PeerName {
    name.parse().unwrap()
}

/// A host that calls.
struct Host {
    trust: Trust,
    limits: Limits,
    _state: TempDir,
}

impl Host {
    fn new(called: &str) -> Host {
        let state = TempDir::new().unwrap();
        let limits = Limits::default();
        Host {
            trust: Trust::open(state.path(), name(called), &limits).unwrap(),
            limits,
            _state: state,
        }
    }

    fn as_peer(&self) -> Peer {
        Peer::new(
            self.trust.name.clone(),
            None,
            self.trust.identity.fingerprint(),
        )
    }

    async fn open(&self, agent: &Agent) -> Result<Connection> {
        let theirs = agent.trust.identity.fingerprint();
        Connection::open(&agent.address, theirs, &self.trust.identity, &self.limits).await
    }

    async fn join(&self, token: &Token) -> Result<Peer> {
        let own = JoinAs {
            name: self.trust.name.clone(),
            address: None,
            call_it: None,
        };
        join(
            token,
            &own,
            &self.trust.identity,
            &self.trust.peers,
            &self.limits,
        )
        .await
    }
}

/// An agent that listens.
struct Agent {
    address: Address,
    socket: SocketAddr,
    trust: Trust,
    desk: Arc<Desk>,
    counters: Box<dyn Fn() -> Counters>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    state: TempDir,
}

impl Agent {
    async fn start(limits: Limits) -> Agent {
        Agent::start_in(TempDir::new().unwrap(), limits).await
    }

    async fn start_in(state: TempDir, limits: Limits) -> Agent {
        let trust = Trust::open(state.path(), name("agent"), &limits).unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Server::bind(any, trust.clone(), limits).await.unwrap();
        let socket = server.local_addr().unwrap();
        let counters = Box::new(server.counters());
        let (stop, desk) = (CancellationToken::new(), Arc::<Desk>::default());
        let task = tokio::spawn({
            let (stop, desk) = (stop.clone(), desk.clone());
            async move { server.serve(desk, stop.cancelled()).await }
        });
        Agent {
            address: socket.into(),
            socket,
            trust,
            desk,
            counters,
            stop,
            task,
            state,
        }
    }

    /// A host that this agent knows.
    fn knows(&self, called: &str) -> Host {
        let host = Host::new(called);
        self.trust.peers.add(&host.as_peer()).unwrap();
        host
    }

    fn invite(&self, ttl: Duration) -> Token {
        let offer = Offer {
            name: self.trust.name.clone(),
            address: self.address.clone(),
            fingerprint: self.trust.identity.fingerprint(),
        };
        self.trust.invites.create(&offer, ttl).unwrap()
    }

    async fn until(&self, what: &str, mut reached: impl FnMut(Counters) -> bool) {
        let start = Instant::now();
        while !reached((self.counters)()) {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{what}: {:?}",
                (self.counters)()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// It still answers a peer: what every attack ends with.
    async fn answers(&self, peer: &Host) {
        let who: Value = peer
            .open(self)
            .await
            .unwrap()
            .call(Method::GET, "/v1/who", &())
            .await
            .unwrap();
        assert_eq!(who["name"], peer.trust.name.as_str());
    }

    async fn stop(self) -> TempDir {
        self.stop.cancel();
        self.task.await.unwrap();
        self.state
    }
}

/// TLS of a peer, without HTTP: for what no client of ours would send.
async fn raw(agent: &Agent, host: &Host) -> tokio_rustls::client::TlsStream<TcpStream> {
    let theirs = agent.trust.identity.fingerprint();
    let (config, _) = tls::client(&host.trust.identity, vec![theirs]).unwrap();
    raw_with(agent, config).await.unwrap()
}

async fn raw_with(
    agent: &Agent,
    config: Arc<rustls::ClientConfig>,
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(agent.socket).await?;
    let any = ServerName::try_from("agent").unwrap();
    TlsConnector::from(config).connect(any, tcp).await
}

/// What comes until the other side closes, within a bound.
async fn rest(mut from: impl tokio::io::AsyncRead + Unpin) -> (Vec<u8>, Option<std::io::Error>) {
    let mut got = Vec::new();
    let read = async { from.read_to_end(&mut got).await.err() };
    let error = tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("the agent does not close the connection");
    (got, error)
}

fn chunks(total: usize, each: usize) -> impl Stream<Item = Result<Bytes, std::io::Error>> + Send {
    let piece = Bytes::from(vec![0x5a; each]);
    stream::iter((0..total / each).map(move |_| Ok(piece.clone())))
}

fn short() -> Limits {
    let short = Duration::from_millis(400);
    Limits {
        handshake: short,
        head_time: short,
        join_time: short,
        json_time: short,
        stall: short,
        linger: short,
        ..Limits::default()
    }
}

fn alert_of(error: &std::io::Error) -> rustls::AlertDescription {
    match error
        .get_ref()
        .and_then(|e| e.downcast_ref::<rustls::Error>())
    {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        other => panic!("no alert but {other:?} in {error:?}"),
    }
}

/// Longer than a head may take: what comes is no head.
#[tokio::test]
async fn streams_go_both_ways_for_as_long_as_they_last() {
    let limits = short();
    let lasts = limits.head_time * 3;
    let agent = Agent::start(limits).await;
    let host = agent.knows("host-a");
    let mut connection = host.open(&agent).await.unwrap();
    let pause = Duration::from_millis(20);
    let pieces = u32::try_from(lasts.as_millis() / pause.as_millis()).unwrap();
    let out = stream::iter(0..pieces).then(move |number| async move {
        tokio::time::sleep(pause).await;
        Ok::<_, std::io::Error>(Bytes::copy_from_slice(&number.to_be_bytes()))
    });
    let mut back = connection
        .exchange(Method::POST, "/v1/back", out)
        .await
        .unwrap();
    let mut came = Vec::new();
    while let Some(piece) = back.next().await {
        came.extend_from_slice(&piece.unwrap());
    }
    let sent: Vec<u8> = (0..pieces).flat_map(u32::to_be_bytes).collect();
    assert_eq!(came, sent);
}

#[tokio::test]
async fn a_peer_is_served() {
    let agent = Agent::start(Limits::default()).await;
    let host = agent.knows("host-a");
    let mut connection = host.open(&agent).await.unwrap();
    assert_eq!(connection.peer_name(), Some(&name("agent")));
    assert_eq!(connection.own_name(), Some(&name("host-a")));
    assert_eq!(connection.peer_addr(), agent.socket);

    let who: Value = connection.call(Method::GET, "/v1/who", &()).await.unwrap();
    assert_eq!(who["remote"], connection.local_addr().to_string());
    assert_eq!(who["local"], connection.peer_addr().to_string());

    let said = json!({"list": [1, 2, 3], "text": "x".repeat(100_000)});
    let heard: Value = connection
        .call(Method::POST, "/v1/echo", &said)
        .await
        .unwrap();
    assert_eq!(heard, said);

    let mut headers = HeaderMap::new();
    headers.insert("livemig-test", "12345".parse().unwrap());
    let count: Value = connection
        .send_stream(
            Method::POST,
            "/v1/count",
            headers,
            chunks(8 << 20, 1 << 18),
            Duration::from_secs(10),
        )
        .await
        .unwrap();
    let expected = blake3::hash(&vec![0x5a; 8 << 20]).to_string();
    assert_eq!(
        count,
        json!({"bytes": 8 << 20, "digest": expected, "header": 5})
    );

    let (_, mut numbers) = connection
        .receive_stream(Method::GET, "/v1/numbers", &())
        .await
        .unwrap();
    let mut sum = 0u64;
    while let Some(piece) = numbers.next().await {
        let piece = piece.unwrap();
        assert!(piece.len() <= Limits::default().read_buffer);
        sum += piece.iter().map(|&b| u64::from(b)).sum::<u64>();
    }
    assert_eq!(sum, 100_000 * (0..64).sum::<u64>());

    // All of it on one connection, and it can be used on.
    assert!(!connection.is_closed());
    assert_eq!((agent.counters)().accepted, 1);
    let _: Value = connection.call(Method::GET, "/v1/who", &()).await.unwrap();
    drop(connection);
    agent.until("all over", |c| c.connections == 0).await;
}

#[tokio::test]
async fn without_a_certificate_there_is_only_a_refusal() {
    let agent = Agent::start(Limits::default()).await;
    let peer = agent.knows("peer");
    // Also while an invitation is open.
    for open in [false, true] {
        if open {
            agent.invite(Duration::from_secs(60));
        }
        let theirs = agent.trust.identity.fingerprint();
        let (_, pinned) = tls::client(&Host::new("x").trust.identity, vec![theirs]).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(
            rustls::crypto::ring::default_provider(),
        ))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(pinned)
        .with_no_client_auth();
        let mut tls = raw_with(&agent, Arc::new(config)).await.unwrap();
        let request = "GET /v1/hello HTTP/1.1\r\nhost: x\r\nlivemig-protocol: 2\r\n\r\n";
        let _ = tls.write_all(request.as_bytes()).await;
        let (got, error) = rest(tls).await;
        assert!(got.is_empty(), "{got:?}");
        assert_eq!(
            alert_of(&error.unwrap()),
            rustls::AlertDescription::CertificateRequired
        );
    }
    agent.answers(&peer).await;
    assert_eq!((agent.counters)().refused, 2);
}

#[tokio::test]
async fn an_unknown_key_is_refused_by_name() {
    let agent = Agent::start(Limits::default()).await;
    let peer = agent.knows("peer");
    let stranger = Host::new("stranger");
    for _ in 0..20 {
        match stranger.open(&agent).await {
            Err(error @ Error::NotAdmitted { .. }) => {
                let own = stranger.trust.identity.fingerprint().to_string();
                assert!(error.to_string().contains(&own));
                assert!(error.hint().unwrap().contains("livemig invite"));
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((agent.counters)().refused, 20);
    assert_eq!((agent.counters)().connections_peak, 0);
    agent.answers(&peer).await;
}

/// Whoever has seen a peer's certificate cannot be that peer without its key.
#[tokio::test]
async fn a_certificate_without_its_key_is_refused_on_both_sides() {
    #[derive(Debug)]
    struct Stolen(Arc<rustls::sign::CertifiedKey>);
    impl rustls::client::ResolvesClientCert for Stolen {
        fn resolve(
            &self,
            _: &[&[u8]],
            _: &[rustls::SignatureScheme],
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(self.0.clone())
        }
        fn has_certs(&self) -> bool {
            true
        }
    }
    impl rustls::server::ResolvesServerCert for Stolen {
        fn resolve(
            &self,
            _: rustls::server::ClientHello<'_>,
        ) -> Option<Arc<rustls::sign::CertifiedKey>> {
            Some(self.0.clone())
        }
    }
    let agent = Agent::start(Limits::default()).await;
    let peer = agent.knows("peer");
    let thief = Host::new("thief");
    let stolen = |from: &Identity| {
        let key = rustls::crypto::ring::sign::any_supported_type(&thief.trust.identity.key());
        let stolen = rustls::sign::CertifiedKey::new(vec![from.certificate()], key.unwrap());
        Arc::new(Stolen(Arc::new(stolen)))
    };

    let theirs = agent.trust.identity.fingerprint();
    let (config, _) = tls::client(&thief.trust.identity, vec![theirs]).unwrap();
    let mut config = (*config).clone();
    config.client_auth_cert_resolver = stolen(&peer.trust.identity);
    let (got, error) = rest(raw_with(&agent, Arc::new(config)).await.unwrap()).await;
    assert!(got.is_empty());
    assert_eq!(
        alert_of(&error.unwrap()),
        rustls::AlertDescription::DecryptError
    );
    agent.answers(&peer).await;

    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::from(listener.local_addr().unwrap());
    let config = tls::server(
        &thief.trust.identity,
        thief.trust.peers.clone(),
        thief.trust.invites.clone(),
    )
    .unwrap();
    let mut config = (*config).clone();
    config.cert_resolver = stolen(&agent.trust.identity);
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let accept = async {
        let (tcp, _) = listener.accept().await.unwrap();
        acceptor.accept(tcp).await
    };
    let open = Connection::open(&address, theirs, &peer.trust.identity, &peer.limits);
    match tokio::join!(open, accept) {
        (Err(Error::Handshake { .. }), Err(_)) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_invited_stranger_can_only_join() {
    let agent = Agent::start(Limits::default()).await;
    let token = agent.invite(Duration::from_secs(60));
    let guest = Host::new("guest");
    let mut connection = guest.open(&agent).await.unwrap();
    assert_eq!(connection.own_name(), None);
    for path in ["/v1/echo", "/v1/who", "/v1/count", "/v2/join", "/"] {
        match connection.call::<_, Value>(Method::POST, path, &1).await {
            Err(Error::Refused { code, status, .. }) => {
                assert_eq!((code.as_str(), status), ("not-a-peer", 403));
            }
            other => panic!("{path}: {other:?}"),
        }
        if connection.is_closed() {
            connection = guest.open(&agent).await.unwrap();
        }
    }
    assert_eq!(agent.desk.done.load(Ordering::SeqCst), 0);
    assert_eq!((agent.counters)().connections_peak, 0);

    let peer = guest.join(&token).await.unwrap();
    assert_eq!(peer.name, name("agent"));
    assert_eq!(peer.address, Some(agent.address.clone()));
    assert_eq!(
        guest.trust.peers.list().unwrap(),
        std::slice::from_ref(&peer)
    );
    let known = agent.trust.peers.get(&name("guest")).unwrap();
    assert_eq!(known.fingerprint, guest.trust.identity.fingerprint());
    assert!(known.may(Permission::Send) && known.may(Permission::Receive));
    agent.answers(&guest).await;
    // What was open when it joined has become a peer's.
    let _: Value = match connection.is_closed() {
        true => guest.open(&agent).await.unwrap(),
        false => connection,
    }
    .call(Method::POST, "/v1/echo", &1)
    .await
    .unwrap();

    // Known to each other, and no invitation is left.
    let stranger = Host::new("stranger");
    assert!(matches!(
        stranger.join(&token).await,
        Err(Error::NotAdmitted { .. })
    ));
}

#[tokio::test]
async fn a_used_or_expired_or_foreign_token_joins_nobody() {
    let agent = Agent::start(Limits::default()).await;
    let (used, _other) = (
        agent.invite(Duration::from_secs(60)),
        agent.invite(Duration::from_secs(60)),
    );
    Host::new("first").join(&used).await.unwrap();
    let refused = |result: Result<Peer>| match result {
        Err(Error::Refused { code, hint, .. }) => (code, hint.unwrap()),
        other => panic!("{other:?}"),
    };
    let (code, hint) = refused(Host::new("second").join(&used).await);
    assert_eq!(code, "not-invited");
    assert!(hint.contains("new token"), "{hint}");

    // Its time is over by the clock of the host that invited, though not by the text.
    let mut expired = agent.invite(Duration::ZERO);
    expired.expires += Duration::from_secs(3600);
    let start = Instant::now();
    while !matches!(
        agent.trust.invites.check(&expired.secret),
        Err(Error::InviteExpired)
    ) {
        assert!(start.elapsed() < Duration::from_secs(10));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let (code, _) = refused(Host::new("third").join(&expired).await);
    assert_eq!(code, "invite-expired");
    // By its text.
    expired.expires = SystemTime::now() - Duration::from_secs(9);
    match Host::new("fourth").join(&expired).await {
        Err(error @ Error::TokenExpired { .. }) => assert!(error.to_string().contains("9 s ago")),
        other => panic!("{other:?}"),
    }

    // A secret that no invitation has.
    let foreign = Agent::start(Limits::default()).await;
    let mut token = foreign.invite(Duration::from_secs(60));
    token.offer = used.offer.clone();
    let (code, _) = refused(Host::new("fifth").join(&token).await);
    assert_eq!(code, "not-invited");
    let known: Vec<_> = agent.trust.peers.list().unwrap();
    assert_eq!(known.len(), 1);
    assert!(matches!(
        foreign
            .trust_as_host()
            .join(&foreign.invite(Duration::from_secs(9)))
            .await,
        Err(Error::OwnToken)
    ));
}

impl Agent {
    fn trust_as_host(&self) -> Host {
        Host {
            trust: self.trust.clone(),
            limits: Limits::default(),
            _state: TempDir::new().unwrap(),
        }
    }
}

#[tokio::test]
async fn a_name_that_is_taken_does_not_use_up_the_token() {
    let agent = Agent::start(Limits::default()).await;
    agent.knows("web");
    let token = agent.invite(Duration::from_secs(60));
    let mut host = Host::new("web");
    match host.join(&token).await {
        Err(Error::Refused { code, status, .. }) => {
            assert_eq!((code.as_str(), status), ("name-taken", 409));
        }
        other => panic!("{other:?}"),
    }
    host.trust.name = name("web-2");
    host.join(&token).await.unwrap();

    // The other way round: the inviting host's name is taken here.
    let token = agent.invite(Duration::from_secs(60));
    let host = Host::new("third");
    let other = Host::new("agent");
    host.trust.peers.add(&other.as_peer()).unwrap();
    assert!(matches!(
        host.join(&token).await,
        Err(Error::NameTaken { .. })
    ));
    assert!(agent.trust.invites.check(&token.secret).is_ok());
    let own = JoinAs {
        name: name("third"),
        address: Some("third.example:1".parse().unwrap()),
        call_it: Some(name("agent-2")),
    };
    let peer = join(
        &token,
        &own,
        &host.trust.identity,
        &host.trust.peers,
        &host.limits,
    )
    .await
    .unwrap();
    assert_eq!(peer.name, name("agent-2"));
    assert_eq!(
        agent.trust.peers.get(&own.name).unwrap().address,
        own.address
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_many_with_one_token_one_joins() {
    let agent = Agent::start(Limits::default()).await;
    // Keeps the door open for those who come second.
    let _other = agent.invite(Duration::from_secs(60));
    for _ in 0..5 {
        let token = agent.invite(Duration::from_secs(60));
        let known = agent.trust.peers.list().unwrap().len();
        let guests: Vec<_> = (0..8)
            .map(|n| Host::new(&format!("guest-{known}-{n}")))
            .collect();
        let results =
            futures::future::join_all(guests.iter().map(|guest| guest.join(&token))).await;
        let joined = results.iter().filter(|result| result.is_ok()).count();
        assert_eq!(joined, 1, "{results:?}");
        assert_eq!(agent.trust.peers.list().unwrap().len(), known + 1);
        for refused in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(
                matches!(refused, Error::Refused { code, .. } if code == "not-invited"),
                "{refused:?}"
            );
        }
    }
}

#[tokio::test]
async fn garbage_is_refused() {
    let agent = Agent::start(short()).await;
    let peer = agent.knows("peer");
    let mut noise = vec![0u8; 100_000];
    for (n, byte) in noise.iter_mut().enumerate() {
        *byte = (n * 7919 + n / 251) as u8;
    }
    let handshake_of_4_gib = [&[22, 3, 1, 0x40, 0, 1, 0xff, 0xff, 0xff][..], &[0; 16384]].concat();
    for garbage in [
        noise.as_slice(),
        b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\0",
        &handshake_of_4_gib,
    ] {
        let mut tcp = TcpStream::connect(agent.socket).await.unwrap();
        let _ = tcp.write_all(garbage).await;
        let (got, _) = rest(tcp).await;
        // At most a TLS alert.
        assert!(
            got.len() <= 7 && got.first().is_none_or(|&b| b == 21),
            "{got:?}"
        );
    }
    agent.until("all gone", |c| c.handshakes == 0).await;
    assert_eq!((agent.counters)().refused + (agent.counters)().timed_out, 5);

    // After the handshake, from a peer.
    let mut tls = raw(&agent, &peer).await;
    tls.write_all(&noise).await.unwrap();
    let (got, _) = rest(tls).await;
    assert!(got.starts_with(b"HTTP/1.1 400 "), "{got:?}");
    agent.answers(&peer).await;
    agent.until("all gone", |c| c.connections == 0).await;
}

#[tokio::test]
async fn an_endless_head_is_cut_off() {
    let agent = Agent::start(Limits::default()).await;
    let peer = agent.knows("peer");
    for line in ["x: y\r\n", "yyyyyyyyyyyyyyyyyyyyyyyyyyyy"] {
        let (mut from, mut to) = tokio::io::split(raw(&agent, &peer).await);
        let writing = async {
            to.write_all(b"GET / HTTP/1.1\r\nhost: x\r\na: ").await?;
            let lines = line.repeat(1000);
            let start = Instant::now();
            while start.elapsed() < Duration::from_secs(20) {
                to.write_all(lines.as_bytes()).await?;
            }
            Ok::<_, std::io::Error>(())
        };
        // It is told, and then cut off, whether it listens or not.
        let (sent, got) = tokio::join!(writing, async { rest(&mut from).await.0 });
        assert!(sent.is_err(), "{sent:?}");
        assert!(
            got.starts_with(b"HTTP/1.1 431 "),
            "{:?}",
            String::from_utf8_lossy(&got)
        );
        agent.until("gone", |c| c.connections == 0).await;
    }
    agent.answers(&peer).await;
}

#[tokio::test]
async fn a_head_that_trickles_is_cut_off() {
    let agent = Agent::start(short()).await;
    let peer = agent.knows("peer");
    let mut tls = raw(&agent, &peer).await;
    // A whole request first: the next head has a time of its own.
    tls.write_all(b"GET /v1/who HTTP/1.1\r\nhost: x\r\nlivemig-protocol: 2\r\n\r\n")
        .await
        .unwrap();
    let mut first = [0; 1024];
    let read = tls.read(&mut first).await.unwrap();
    assert!(first[..read].starts_with(b"HTTP/1.1 200 "));

    let (mut from, mut to) = tokio::io::split(tls);
    let start = Instant::now();
    let trickle = async {
        for byte in b"GET /v1/who HTTP/1.1\r\nhost: "
            .iter()
            .chain([&b'x'; 3000])
        {
            to.write_all(&[*byte]).await?;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok::<_, std::io::Error>(())
    };
    let (trickle, (_, _)) = tokio::join!(trickle, rest(&mut from));
    assert!(trickle.is_err());
    assert!(start.elapsed() >= Duration::from_millis(400));
    assert!(start.elapsed() < Duration::from_secs(10));
    agent.until("gone", |c| c.connections == 0).await;
    agent.answers(&peer).await;
}

/// A peer may be silent between requests for longer than within a head.
#[tokio::test]
async fn idle_is_not_slow_but_has_its_own_bound() {
    let limits = Limits {
        idle: Duration::from_secs(2),
        ..short()
    };
    let agent = Agent::start(limits).await;
    let peer = agent.knows("peer");
    let mut connection = peer.open(&agent).await.unwrap();
    let asked = Instant::now();
    let bound = Duration::from_millis(700);
    while asked.elapsed() < bound {
        tokio::time::sleep(bound - asked.elapsed()).await;
    }
    let _: Value = connection.call(Method::GET, "/v1/who", &()).await.unwrap();
    agent
        .until("closed when idle", |c| c.connections == 0)
        .await;
    let start = Instant::now();
    while !connection.is_closed() {
        assert!(start.elapsed() < Duration::from_secs(10));
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        connection
            .call::<_, Value>(Method::GET, "/v1/who", &())
            .await,
        Err(Error::Closed)
    ));
}

#[tokio::test]
async fn half_open_connections_keep_nobody_out() {
    let limits = Limits {
        handshakes: 16,
        handshake: Duration::from_secs(3),
        ..short()
    };
    let most = limits.connections + limits.handshakes + 8;
    let agent = Agent::start(limits).await;
    let peer = agent.knows("peer");
    // Both ends are in this process; as a rule it may have more descriptors than it has asked for.
    let descriptors = rustix::process::Resource::Nofile;
    let mut more = rustix::process::getrlimit(descriptors);
    more.current = more.maximum;
    rustix::process::setrlimit(descriptors, more).unwrap();
    let mut half_open = Vec::new();
    for n in 0..1000 {
        let mut tcp = TcpStream::connect(agent.socket).await.unwrap();
        if n % 2 == 0 {
            // The start of a handshake, and never more.
            tcp.write_all(&[22, 3, 1, 2, 0, 1]).await.unwrap();
        }
        half_open.push(tcp);
        if n % 250 == 249 {
            agent.answers(&peer).await;
        }
    }
    agent.answers(&peer).await;
    let counters = (agent.counters)();
    assert!(counters.handshakes_peak <= 16, "{counters:?}");
    assert!(counters.tasks_peak <= most, "{counters:?}");
    assert!(counters.pushed_out >= 984, "{counters:?}");
    // The rest goes by itself, though the sockets are still open here.
    agent.until("all gone", |c| c.handshakes == 0).await;
    agent.answers(&peer).await;
    drop(half_open);
}

#[tokio::test]
async fn connections_have_a_limit_that_says_so() {
    let limits = Limits {
        connections: 5,
        connections_per_peer: 3,
        ..Limits::default()
    };
    let agent = Agent::start(limits).await;
    let (a, b) = (agent.knows("a"), agent.knows("b"));
    let mut open = Vec::new();
    for host in [&a, &a, &a] {
        open.push(host.open(&agent).await.unwrap());
    }
    let refused = |result: Result<Connection>| match result {
        Err(Error::Refused {
            code,
            message,
            status,
            ..
        }) => {
            assert_eq!((code.as_str(), status), ("too-many-connections", 503));
            message
        }
        other => panic!("{other:?}"),
    };
    assert!(refused(a.open(&agent).await).contains("connections_per_peer"));
    for host in [&b, &b] {
        open.push(host.open(&agent).await.unwrap());
    }
    assert!(refused(b.open(&agent).await).contains("(connections)"));
    assert_eq!((agent.counters)().connections_peak, 5);
    drop(open);
    agent.until("free again", |c| c.connections == 0).await;
    agent.answers(&a).await;
}

#[tokio::test]
async fn bodies_have_limits_that_say_so() {
    let limits = Limits {
        json: 10_000,
        ..short()
    };
    let agent = Agent::start(limits.clone()).await;
    let peer = agent.knows("peer");
    let large = json!("x".repeat(20_000));
    let mut connection = peer.open(&agent).await.unwrap();
    match connection
        .call::<_, Value>(Method::POST, "/v1/echo", &large)
        .await
    {
        Err(Error::Refused {
            code,
            message,
            status,
            ..
        }) => {
            assert_eq!((code.as_str(), status), ("body-too-large", 413));
            assert!(message.contains("10000 bytes (limit: json)"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    // Announced by nothing: chunked.
    let mut connection = peer.open(&agent).await.unwrap();
    match connection
        .send_stream::<_, _, Value>(
            Method::POST,
            "/v1/echo",
            HeaderMap::new(),
            chunks(256 << 20, 1 << 16),
            Duration::from_secs(5),
        )
        .await
    {
        Err(Error::Refused { status: 413, .. }) => {}
        other => panic!("{other:?}"),
    }
    // Of a request to join, as from a stranger.
    agent.invite(Duration::from_secs(60));
    let stranger = Host::new("stranger");
    let mut connection = stranger.open(&agent).await.unwrap();
    let ask = json!({"secret": "x".repeat(5000), "name": "stranger"});
    match connection
        .call::<_, Value>(Method::POST, "/v1/join", &ask)
        .await
    {
        Err(Error::Refused { status: 413, .. }) => {}
        other => panic!("{other:?}"),
    }
    // By the caller itself, before anything is sent.
    let mut careful = Host::new("careful");
    agent.trust.peers.add(&careful.as_peer()).unwrap();
    careful.limits.json = 10_000;
    let mut connection = careful.open(&agent).await.unwrap();
    match connection
        .call::<_, Value>(Method::POST, "/v1/echo", &large)
        .await
    {
        Err(Error::TooLarge { limit: "json", .. }) => {}
        other => panic!("{other:?}"),
    }
    // Of an answer.
    let mut connection = careful.open(&agent).await.unwrap();
    careful.limits.json = 100;
    let mut narrow = careful.open(&agent).await.unwrap();
    let _: Value = connection.call(Method::GET, "/v1/who", &()).await.unwrap();
    let (_, body) = narrow
        .receive_stream(Method::GET, "/v1/numbers", &())
        .await
        .unwrap();
    match body.json::<Value>().await {
        Err(Error::TooLarge { .. }) => {}
        other => panic!("{other:?}"),
    }
    // Not JSON, and a body that never comes.
    let mut tls = raw(&agent, &peer).await;
    tls.write_all(
        b"POST /v1/echo HTTP/1.1\r\nhost: x\r\nlivemig-protocol: 2\r\ncontent-length: 3\r\n\r\n{]}",
    )
    .await
    .unwrap();
    let mut answer = [0; 2048];
    let read = tls.read(&mut answer).await.unwrap();
    let text = String::from_utf8_lossy(&answer[..read]);
    assert!(
        text.starts_with("HTTP/1.1 400 ") && text.contains("bad-json"),
        "{text}"
    );
    tls.write_all(
        b"POST /v1/echo HTTP/1.1\r\nhost: x\r\nlivemig-protocol: 2\r\ncontent-length: 3\r\n\r\n{",
    )
    .await
    .unwrap();
    let (got, _) = rest(tls).await;
    let text = String::from_utf8_lossy(&got);
    assert!(
        text.starts_with("HTTP/1.1 408 ") && text.contains("too-slow"),
        "{text}"
    );
}

#[tokio::test]
async fn another_host_at_the_address_is_named() {
    let agent = Agent::start(Limits::default()).await;
    let host = agent.knows("host");
    let other = Host::new("other").trust.identity.fingerprint();
    let error = Connection::open(&agent.address, other, &host.trust.identity, &host.limits)
        .await
        .unwrap_err();
    assert!(matches!(error, Error::WrongHost { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(&other.to_string()), "{message}");
    let found = agent.trust.identity.fingerprint().to_string();
    assert!(message.contains(&found), "{message}");
}

/// A ClientHello as TLS 1.2 has it (RFC 5246 section 7.4.1.2), without supported_versions.
#[tokio::test]
async fn tls_1_2_is_refused() {
    let agent = Agent::start(short()).await;
    let mut hello = vec![3, 3];
    hello.extend([7; 32]);
    hello.push(0);
    // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    hello.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2f]);
    hello.extend([1, 0]);
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 29, // supported_groups: x25519
        0, 11, 0, 2, 1, 0, // ec_point_formats: uncompressed
        0, 13, 0, 6, 0, 4, 4, 3, 8, 7, // signature_algorithms: ECDSA P-256, Ed25519
        0, 23, 0, 0, // extended_master_secret
    ];
    hello.extend((extensions.len() as u16).to_be_bytes());
    hello.extend(extensions);
    let mut message = vec![1, 0];
    message.extend((hello.len() as u16).to_be_bytes());
    message.extend(hello);
    let mut record = vec![22, 3, 1];
    record.extend((message.len() as u16).to_be_bytes());
    record.extend(message);

    let mut tcp = TcpStream::connect(agent.socket).await.unwrap();
    tcp.write_all(&record).await.unwrap();
    let (got, _) = rest(tcp).await;
    // Alert, fatal, protocol_version (RFC 8446 section 6).
    assert_eq!(got, [21, 3, 3, 0, 2, 2, 70]);
}

#[tokio::test]
async fn versions_must_agree_and_both_are_named() {
    let agent = Agent::start(Limits::default()).await;
    let peer = agent.knows("peer");
    for (header, named) in [
        ("livemig-protocol: 9\r\n", "version 9"),
        ("", "version none"),
    ] {
        let mut tls = raw(&agent, &peer).await;
        let request =
            format!("GET /v1/hello HTTP/1.1\r\nhost: x\r\n{header}connection: close\r\n\r\n");
        tls.write_all(request.as_bytes()).await.unwrap();
        let (got, _) = rest(tls).await;
        let text = String::from_utf8_lossy(&got);
        assert!(text.starts_with("HTTP/1.1 400 "), "{text}");
        assert!(text.contains("protocol-mismatch"), "{text}");
        assert!(
            text.contains(named) && text.contains("version 2\""),
            "{text}"
        );
        assert!(text.contains("livemig-protocol: 2"), "{text}");
    }

    // An agent of another version, whatever it says.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = Address::from(listener.local_addr().unwrap());
    let trust = &agent.trust;
    let config = tls::server(&trust.identity, trust.peers.clone(), trust.invites.clone()).unwrap();
    let serve = async {
        let (tcp, _) = listener.accept().await.unwrap();
        let mut tls = TlsAcceptor::from(config).accept(tcp).await.unwrap();
        let mut request = [0; 1024];
        let _ = tls.read(&mut request).await.unwrap();
        tls.write_all(
            b"HTTP/1.1 400 Bad Request\r\nlivemig-protocol: 7\r\ncontent-length: 0\r\n\r\n",
        )
        .await
        .unwrap();
        tls
    };
    let open = Connection::open(
        &address,
        trust.identity.fingerprint(),
        &peer.trust.identity,
        &peer.limits,
    );
    match tokio::join!(open, serve).0 {
        Err(error @ Error::Protocol { .. }) => {
            let text = error.to_string();
            assert!(
                text.contains("version 7") && text.contains("version 2"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_was_taken_from_a_peer_is_gone_at_once() {
    let agent = Agent::start(Limits::default()).await;
    let host = agent.knows("host");
    let mut connection = host.open(&agent).await.unwrap();
    let _: Value = connection.call(Method::GET, "/v1/who", &()).await.unwrap();
    assert!(agent.trust.peers.remove(&name("host")).unwrap());
    match connection
        .call::<_, Value>(Method::GET, "/v1/who", &())
        .await
    {
        Err(Error::Refused { code, .. }) => assert_eq!(code, "not-a-peer"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        host.open(&agent).await,
        Err(Error::NotAdmitted { .. })
    ));
}

#[tokio::test]
async fn a_restarted_agent_knows_its_peers() {
    let agent = Agent::start(Limits::default()).await;
    let token = agent.invite(Duration::from_secs(60));
    let (host, late) = (Host::new("host"), Host::new("late"));
    let later = agent.invite(Duration::from_secs(60));
    host.join(&token).await.unwrap();
    let fingerprint = agent.trust.identity.fingerprint();
    // With a connection open: stopping does not wait for idle ones.
    let idle = host.open(&agent).await.unwrap();
    let start = Instant::now();
    let state = agent.stop().await;
    assert!(start.elapsed() < Duration::from_secs(5));
    drop(idle);

    let agent = Agent::start_in(state, Limits::default()).await;
    assert_eq!(agent.trust.identity.fingerprint(), fingerprint);
    agent.answers(&host).await;
    // Open invitations stay open as well.
    let mut later = later;
    later.offer.address = agent.address.clone();
    late.join(&later).await.unwrap();
}

#[tokio::test]
async fn a_handler_that_panics_harms_nobody_else() {
    let agent = Agent::start(Limits::default()).await;
    let host = agent.knows("host");
    let mut connection = host.open(&agent).await.unwrap();
    match connection
        .call::<_, Value>(Method::GET, "/v1/panic", &())
        .await
    {
        Err(Error::Refused { code, status, .. }) => {
            assert_eq!((code.as_str(), status), ("internal", 500))
        }
        other => panic!("{other:?}"),
    }
    agent.answers(&host).await;
    agent.until("none left", |c| c.requests == 0).await;
}

#[tokio::test]
async fn a_refusal_arrives_though_a_stream_is_on_its_way() {
    let agent = Agent::start(Limits::default()).await;
    let host = agent.knows("host");
    for each in [4 << 10, 1 << 20] {
        for _ in 0..10 {
            let mut connection = host.open(&agent).await.unwrap();
            let endless = chunks(1 << 40, each);
            let start = Instant::now();
            match connection
                .send_stream::<_, _, Value>(
                    Method::POST,
                    "/v1/refuse",
                    HeaderMap::new(),
                    endless,
                    Duration::from_secs(5),
                )
                .await
            {
                Err(Error::Refused {
                    code,
                    message,
                    hint,
                    status,
                }) => {
                    assert_eq!((code.as_str(), status), ("no-room", 409));
                    assert_eq!(message, "there is no room");
                    assert_eq!(hint.as_deref(), Some("make some"));
                }
                other => panic!("{other:?}"),
            }
            assert!(start.elapsed() < Duration::from_secs(2));
        }
    }
    agent.until("none left", |c| c.connections == 0).await;
}

#[tokio::test]
async fn every_wait_of_a_stream_has_a_bound() {
    let agent = Agent::start(Limits::default()).await;
    let mut host = agent.knows("host");
    host.limits.stall = Duration::from_millis(300);
    let send =
        async |path: &str, stream: stream::BoxStream<'static, Result<Bytes, std::io::Error>>| {
            let mut connection = host.open(&agent).await.unwrap();
            let answer_within = Duration::from_millis(300);
            let result = connection
                .send_stream::<_, _, Value>(
                    Method::POST,
                    path,
                    HeaderMap::new(),
                    stream,
                    answer_within,
                )
                .await;
            (result.unwrap_err(), connection)
        };
    // The other side takes nothing.
    let (error, connection) = send("/v1/swallow", chunks(1 << 30, 1 << 20).boxed()).await;
    assert!(
        matches!(error, Error::TimedOut { limit: "stall", doing, .. } if doing.contains("take")),
        "{error:?}"
    );
    drop(connection);
    // There is nothing to send.
    let (error, _connection) = send(
        "/v1/count",
        chunks(1 << 20, 1 << 20).chain(stream::pending()).boxed(),
    )
    .await;
    assert!(
        matches!(error, Error::TimedOut { limit: "stall", doing, .. } if doing.contains("more")),
        "{error:?}"
    );
    // It is not answered.
    let (error, mut connection) = send("/v1/slow", chunks(1 << 20, 1 << 20).boxed()).await;
    assert!(
        matches!(
            error,
            Error::TimedOut {
                limit: "answer_within",
                ..
            }
        ),
        "{error:?}"
    );
    let start = Instant::now();
    while !connection.is_closed() {
        assert!(start.elapsed() < Duration::from_secs(10));
        tokio::task::yield_now().await;
    }
    assert!(matches!(
        connection
            .call::<_, Value>(Method::GET, "/v1/who", &())
            .await,
        Err(Error::Closed)
    ));
    // It breaks off here.
    let broken = stream::iter([
        Ok(Bytes::from_static(b"x")),
        Err(std::io::Error::other("no more")),
    ]);
    let (error, _connection) = send("/v1/count", broken.boxed()).await;
    assert!(
        matches!(&error, Error::Source(cause) if cause.to_string() == "no more"),
        "{error:?}"
    );
}

/// The handler's side of a stream that stops, and of a caller that goes away.
#[tokio::test]
async fn a_handler_is_not_cut_off_when_its_caller_goes() {
    let agent = Agent::start(short()).await;
    let host = agent.knows("host");
    let mut tls = raw(&agent, &host).await;
    tls.write_all(
        b"POST /v1/later HTTP/1.1\r\nhost: x\r\nlivemig-protocol: 2\r\ncontent-length: 9\r\n\r\n1",
    )
    .await
    .unwrap();
    agent.until("begun", |c| c.requests == 1).await;
    drop(tls);
    agent.until("ended", |c| c.requests == 0).await;
    assert_eq!(agent.desk.done.load(Ordering::SeqCst), 1);

    // Open but silent: the stall time-out ends it, with a reason.
    let mut tls = raw(&agent, &host).await;
    tls.write_all(
        b"POST /v1/count HTTP/1.1\r\nhost: x\r\nlivemig-protocol: 2\r\ncontent-length: 9\r\n\r\n1",
    )
    .await
    .unwrap();
    let (got, _) = rest(tls).await;
    let text = String::from_utf8_lossy(&got);
    assert!(
        text.starts_with("HTTP/1.1 408 ") && text.contains("stall"),
        "{text}"
    );
}

/// In a process of its own, as the limit is one of the whole process.
#[test]
fn without_file_descriptors_it_waits_for_some() {
    const CHILD: &str = "LIVEMIG_TEST_FEW_DESCRIPTORS";
    if std::env::var_os(CHILD).is_none() {
        let this = std::env::current_exe().unwrap();
        let output = std::process::Command::new(this)
            .args([
                "--exact",
                "agent::tests::without_file_descriptors_it_waits_for_some",
            ])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains("1 passed"),
            "{said}"
        );
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let agent = Agent::start(Limits::default()).await;
        let peer = agent.knows("peer");
        agent.answers(&peer).await;
        agent.until("quiet", |c| c.connections == 0).await;
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count() as u64;
        let few = rustix::process::Rlimit {
            current: Some(open + 10),
            maximum: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
        };
        rustix::process::setrlimit(rustix::process::Resource::Nofile, few).unwrap();
        let mut half_open = Vec::new();
        while let Ok(tcp) = TcpStream::connect(agent.socket).await {
            half_open.push(tcp);
            assert!(half_open.len() < 20);
        }
        agent.until("cannot accept", |c| c.not_accepted >= 3).await;
        drop(half_open);
        agent.until("all gone", |c| c.handshakes == 0).await;
        agent.answers(&peer).await;
    });
}

/// Agents of which each knows each other, by the names `a`, `b`, `c`.
async fn acquainted<const N: usize>() -> [Agent; N] {
    let agents: Vec<Agent> = stream::iter(0..N)
        .then(|_| Agent::start(Limits::default()))
        .collect()
        .await;
    for (here, agent) in agents.iter().enumerate() {
        for (there, other) in agents.iter().enumerate() {
            if here != there {
                let key = other.trust.identity.fingerprint();
                let peer = Peer::new(letter(there), Some(other.address.clone()), key);
                agent.trust.peers.add(&peer).unwrap();
            }
        }
    }
    agents.try_into().ok().unwrap()
}

fn letter(number: usize) -> PeerName {
    name(["a", "b", "c"][number])
}

impl Agent {
    /// The key that it has on disk.
    fn key(&self) -> Fingerprint {
        Identity::load_or_create(self.state.path())
            .unwrap()
            .fingerprint()
    }

    async fn rekey(&self, without: &[PeerName]) -> Result<Rekeyed> {
        rekey(self.state.path(), without, &Limits::default()).await
    }

    async fn calls(&self, called: &str) -> Result<Connection> {
        let peer = self.trust.peers.get(&name(called)).unwrap();
        let address = peer.address.as_ref().unwrap();
        Connection::to_peer(
            address,
            &peer,
            self.state.path(),
            &self.trust_as_host().limits,
        )
        .await
    }

    async fn is_called_with(&self, key: &Identity) -> Result<Connection> {
        let own = self.key();
        Connection::open(&self.address, own, key, &Limits::default()).await
    }
}

fn words(rekeyed: &Rekeyed) -> Vec<(&str, &Word)> {
    let told = rekeyed.peers.iter();
    told.map(|told| (told.name.as_str(), &told.word)).collect()
}

/// Each knows the other by its key, and the first one's is this one and no other.
async fn assert_replaced(a: &Agent, b: &Agent, old: &Identity) {
    let (key, known) = (a.key(), b.trust.peers.get(&name("a")).unwrap());
    assert_ne!(key, old.fingerprint());
    a.calls("b").await.unwrap();
    b.calls("a").await.unwrap();
    assert_eq!((known.fingerprint, known.next), (key, None));
    assert_eq!(known.lasting(), old.fingerprint());
    assert!(matches!(
        b.is_called_with(old).await,
        Err(Error::NotAdmitted { .. })
    ));
    let left = std::fs::read_dir(a.state.path().join("identity")).unwrap();
    assert_eq!(left.count(), 1, "nothing but the key");
}

#[tokio::test]
async fn a_key_is_replaced_while_the_agent_runs() {
    let [a, b, c] = acquainted().await;
    let old = a.trust.identity.clone();
    b.trust
        .peers
        .allow(&name("a"), [Permission::Receive].into())
        .unwrap();
    a.invite(Duration::from_secs(60));
    // What has begun goes on.
    let mut before = b.calls("a").await.unwrap();

    let rekeyed = a.rekey(&[]).await.unwrap();
    assert_eq!(words(&rekeyed), [("b", &Word::New), ("c", &Word::New)]);
    assert!(rekeyed.is_done());
    assert_eq!((rekeyed.fingerprint, rekeyed.next), (a.key(), None));
    assert_eq!(rekeyed.invitations, 1);
    for other in [&b, &c] {
        assert_replaced(&a, other, &old).await;
    }
    let known = b.trust.peers.get(&name("a")).unwrap();
    assert!(known.may(Permission::Receive) && !known.may(Permission::Send));
    let _: Value = before.call(Method::GET, "/v1/who", &()).await.unwrap();
    drop(before);

    // Whoever has the old key is nobody, and cannot come in by it either.
    let stranger = Host {
        trust: Trust {
            identity: old.clone(),
            ..Host::new("x").trust
        },
        ..Host::new("x")
    };
    let token = Token {
        offer: Offer {
            fingerprint: b.key(),
            ..b.invite(Duration::from_secs(9)).offer
        },
        ..b.invite(Duration::from_secs(9))
    };
    match stranger.join(&token).await {
        Err(Error::Refused { code, .. }) => assert_eq!(code, "known-by-other-name"),
        other => panic!("{other:?}"),
    }

    // Once more, and by the other one as well.
    let second = a.key();
    assert!(a.rekey(&[]).await.unwrap().is_done());
    assert!(b.rekey(&[]).await.unwrap().is_done());
    assert_ne!(a.key(), second);
    assert_replaced(&a, &b, &old).await;
}

#[tokio::test]
async fn a_key_stays_until_everybody_has_been_told_of_the_next() {
    let [a, b, c] = acquainted().await;
    let old = a.trust.identity.clone();
    let state = c.stop().await;
    let rekeyed = a.rekey(&[]).await.unwrap();
    let [("b", Word::Both { why: None }), ("c", Word::Old { why })] = words(&rekeyed)[..] else {
        panic!("{rekeyed:?}");
    };
    assert!(why.contains("could not connect"), "{why}");
    assert!(!rekeyed.is_done());
    assert_eq!(rekeyed.fingerprint, old.fingerprint());
    assert_eq!(a.key(), old.fingerprint());
    a.calls("b").await.unwrap();
    b.calls("a").await.unwrap();
    assert!(matches!(
        a.rekey(&[name("nobody")]).await,
        Err(Error::UnknownPeer { .. })
    ));

    // When it is there it goes on with the same one.
    let c = Agent::start_in(state, Limits::default()).await;
    let mut known = a.trust.peers.get(&name("c")).unwrap();
    known.address = Some(c.address.clone());
    a.trust.peers.add(&known).unwrap();
    let done = a.rekey(&[]).await.unwrap();
    assert!(done.is_done(), "{done:?}");
    assert_eq!(Some(done.fingerprint), rekeyed.next);
    for other in [&b, &c] {
        assert_replaced(&a, other, &old).await;
    }

    // Or it is done without it.
    let last = a.key();
    let state = c.stop().await;
    let done = a.rekey(&[name("c")]).await.unwrap();
    assert_eq!(words(&done), [("b", &Word::New), ("c", &Word::Lost)]);
    assert!(done.is_done() && a.key() != last);
    let c = Agent::start_in(state, Limits::default()).await;
    assert!(matches!(
        c.is_called_with(&Identity::load_or_create(a.state.path()).unwrap())
            .await,
        Err(Error::NotAdmitted { .. })
    ));
    assert!(c.calls("a").await.is_err());
}

/// Whatever files and peers a crash has left: both hosts are served, and the next call brings it to its end.
#[tokio::test]
async fn a_replacement_of_a_key_goes_on_after_a_crash() {
    for crash in ["made", "told", "about to be replaced", "replaced", "shown"] {
        let [a, b] = acquainted().await;
        let old = a.trust.identity.clone();
        let directory = a.state.path().join("identity");
        let next = Identity::load_or_make(&directory, "next.pem").unwrap();
        if crash != "made" {
            let mut connection = b.is_called_with(&old).await.unwrap();
            let ask = json!({"next": next.fingerprint()});
            let _: Value = connection
                .call(Method::POST, "/v1/key", &ask)
                .await
                .unwrap();
        }
        if !["made", "told"].contains(&crash) {
            std::fs::write(directory.join("showing"), "").unwrap();
        }
        if ["replaced", "shown"].contains(&crash) {
            std::fs::rename(directory.join("next.pem"), directory.join("key.pem")).unwrap();
        }
        if crash == "shown" {
            b.is_called_with(&next).await.unwrap();
        }
        // Not that of a host that is about to show the new key: that would be the last step.
        b.calls("a")
            .await
            .unwrap_or_else(|error| panic!("{crash}: {error}"));
        let rekeyed = a.rekey(&[]).await.unwrap();
        assert!(rekeyed.is_done(), "{crash}: {rekeyed:?}");
        assert_eq!(rekeyed.fingerprint, next.fingerprint(), "{crash}");
        assert_replaced(&a, &b, &old).await;
    }
}

#[tokio::test]
async fn a_key_is_not_replaced_while_it_is_in_use() {
    let [a, b] = acquainted().await;
    let old = a.trust.identity.clone();
    let mut migration = a.calls("b").await.unwrap();
    let impatient = Limits {
        answer: Duration::from_millis(100),
        ..Limits::default()
    };
    let refused = rekey(a.state.path(), &[], &impatient).await;
    assert!(matches!(refused, Err(Error::KeyInUse)), "{refused:?}");
    assert_eq!(a.key(), old.fingerprint());
    let _: Value = migration.call(Method::GET, "/v1/who", &()).await.unwrap();
    // Others may begin meanwhile.
    a.calls("b").await.unwrap();
    drop(migration);
    assert!(a.rekey(&[]).await.unwrap().is_done());
    assert_replaced(&a, &b, &old).await;
}

/// With its own key a peer can say which it will have. Not another's.
#[tokio::test]
async fn a_peer_cannot_take_the_key_of_another() {
    let [a, b, c] = acquainted().await;
    let stranger = Host::new("stranger");
    let mut connection = a.calls("b").await.unwrap();
    for taken in [c.key(), b.key()] {
        let refused = connection
            .call::<_, Value>(Method::POST, "/v1/key", &json!({"next": taken}))
            .await;
        match refused {
            Err(Error::Refused { code, .. }) => assert_eq!(code, "known-by-other-name"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(b.trust.peers.get(&name("a")).unwrap().next, None);

    // Invited, and no peer yet.
    let _invitation = b.invite(Duration::from_secs(60));
    let mut connection = b.is_called_with(&stranger.trust.identity).await.unwrap();
    let next = json!({"next": stranger.trust.identity.fingerprint()});
    match connection
        .call::<_, Value>(Method::POST, "/v1/key", &next)
        .await
    {
        Err(Error::Refused { code, .. }) => assert_eq!(code, "not-a-peer"),
        other => panic!("{other:?}"),
    }
}
