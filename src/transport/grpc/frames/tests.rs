use std::collections::VecDeque;

use http_body_util::BodyExt;
use proptest::prelude::*;

use super::*;
use crate::domain::ModelControl;

/// A body of these pieces.
struct Pieces(VecDeque<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.pop_front().map(|piece| Ok(Frame::data(piece))))
    }
}

struct NoControl;

impl ModelControl for NoControl {
    fn index(&self) -> Vec<crate::domain::IndexEntry> {
        Vec::new()
    }

    fn load<'a>(
        &'a self,
        _: &'a crate::domain::ModelName,
        _: Option<&'a str>,
        _: Vec<crate::domain::ModelFile>,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>> {
        Box::pin(async { Ok(()) })
    }

    fn unload<'a>(
        &'a self,
        _: &'a crate::domain::ModelName,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>> {
        Box::pin(async { Ok(()) })
    }
}

fn api(body_max_bytes: usize) -> Arc<Api> {
    let settings = crate::transport::Settings { body_max_bytes, ..Default::default() };
    let gateway = crate::gateway::Gateway::new(
        Arc::new(crate::route::Published::new(crate::route::RouteTable::default())),
        Arc::new(crate::observe::Observer::default()),
        Arc::new(NoControl),
        crate::gateway::Settings::default(),
    );
    Arc::new(Api {
        gateway: Arc::new(gateway),
        health: Arc::new(crate::transport::Health::default()),
        shm: crate::transport::shm::SharedMemory::new(false),
        toggles: crate::transport::toggles::Toggles::default(),
        intake: crate::transport::intake::Intake::new(&settings),
        settings,
    })
}

/// `flag`, length and message.
fn framed(flag: u8, message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).unwrap();
    [&[flag], &len.to_be_bytes()[..], message].concat()
}

fn zlib(data: &[u8]) -> Vec<u8> {
    use std::io::Write as _;
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// What comes out of a body that arrives in pieces of these sizes, over and over.
fn through(
    api: &Arc<Api>,
    bytes: &[u8],
    sizes: &[usize],
    one: bool,
) -> (Vec<Bytes>, Arc<Bill>, Option<Status>) {
    let mut left = Bytes::copy_from_slice(bytes);
    let mut pieces = VecDeque::new();
    for size in sizes.iter().cycle() {
        if left.is_empty() {
            break;
        }
        pieces.push_back(left.split_to((*size).min(left.len())));
    }
    let bill = Bill::new(api);
    let limits = Limits { one, message_bytes: api.settings.body_max_bytes };
    let deadline = Instant::now() + std::time::Duration::from_secs(60);
    let encoding = Some(Encoding::Deflate);
    let mut frames = Frames::new(Pieces(pieces), Arc::clone(&bill), encoding, limits, deadline);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut out = Vec::new();
        while let Some(frame) = frames.frame().await {
            match frame {
                Ok(frame) => out.extend(frame.into_data().ok()),
                Err(status) => return (out, bill, Some(status)),
            }
        }
        (out, bill, None)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn messages_come_out_whole_plain_and_apart(
        messages in prop::collection::vec((any::<bool>(), prop::collection::vec(any::<u8>(), 0..40)), 0..6),
        sizes in prop::collection::vec(1..30_usize, 1..6),
    ) {
        let api = api(1 << 20);
        let mut sent = Vec::new();
        let mut plain = Vec::new();
        let mut ends = Vec::new();
        for (packed, message) in &messages {
            sent.extend(if *packed { framed(1, &zlib(message)) } else { framed(0, message) });
            plain.extend(framed(0, message));
            ends.push(plain.len());
        }
        let (pieces, bill, error) = through(&api, &sent, &sizes, false);
        prop_assert!(error.is_none(), "{error:?}");
        let mut at = 0;
        for piece in &pieces {
            let end = ends.iter().find(|end| **end > at).copied().unwrap_or(0);
            prop_assert!(at + piece.len() <= end, "a piece reaches into the next message");
            at += piece.len();
        }
        prop_assert_eq!(pieces.concat(), plain);
        let held = api.intake.budget().held();
        prop_assert_eq!(bill.take().bytes(), held);
        prop_assert_eq!(api.intake.budget().held(), 0);
    }
}

#[test]
fn what_breaks_a_limit_ends_the_call() {
    let api = api(1 << 20);
    let two = [framed(0, b"a"), framed(0, b"b")].concat();
    let bomb = framed(1, &zlib(&vec![0; 4 << 20]));
    let cases: [(&str, Vec<u8>, bool, tonic::Code); 4] = [
        ("two on a unary call", two.clone(), true, tonic::Code::InvalidArgument),
        ("too long", vec![0, 0, 0x10, 0, 1], false, tonic::Code::ResourceExhausted),
        ("a bomb", bomb, false, tonic::Code::ResourceExhausted),
        ("not what it says", framed(1, b"xyz"), false, tonic::Code::InvalidArgument),
    ];
    for (name, bytes, one, want) in cases {
        for sizes in [&[1][..], &[3, 7], &[1 << 20]] {
            let (_, bill, error) = through(&api, &bytes, sizes, one);
            assert_eq!(error.map(|status| status.code()), Some(want), "{name}");
            drop(bill);
            assert_eq!(api.intake.budget().held(), 0, "{name}");
        }
    }
    assert!(through(&api, &two, &[4], false).2.is_none());
}
