use proptest::prelude::*;

use super::*;

fn leaf(data: &[u8]) -> Hash {
    Sha256::new().chain_update([0]).chain_update(data).finalize().into()
}

fn leaves(count: u64) -> Vec<Hash> {
    (0..count).map(|at| leaf(&at.to_le_bytes())).collect()
}

fn hex(text: &str) -> Hash {
    let mut hash = [0; 32];
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).unwrap();
    }
    hash
}

/// RFC 6962, section 2.1, word for word.
fn mth(d: &[Hash]) -> Hash {
    match d {
        [] => Sha256::digest(b"").into(),
        [one] => *one,
        _ => {
            let k = split_slowly(d.len());
            node(&mth(&d[..k]), &mth(&d[k..]))
        }
    }
}

fn split_slowly(n: usize) -> usize {
    let mut k = 1;
    while k * 2 < n {
        k *= 2;
    }
    k
}

/// Section 2.1.1.
fn path(m: usize, d: &[Hash]) -> Vec<Hash> {
    if d.len() == 1 {
        return Vec::new();
    }
    let k = split_slowly(d.len());
    let (mut found, other) = match m < k {
        true => (path(m, &d[..k]), mth(&d[k..])),
        false => (path(m - k, &d[k..]), mth(&d[..k])),
    };
    found.push(other);
    found
}

/// Section 2.1.2.
fn subproof(m: usize, d: &[Hash], b: bool) -> Vec<Hash> {
    if m == d.len() {
        return if b { Vec::new() } else { vec![mth(d)] };
    }
    let k = split_slowly(d.len());
    let (mut found, other) = match m <= k {
        true => (subproof(m, &d[..k], b), mth(&d[k..])),
        false => (subproof(m - k, &d[k..], false), mth(&d[..k])),
    };
    found.push(other);
    found
}

/// Leaves and roots that the Certificate Transparency project tests its trees with.
#[test]
fn the_published_tree_has_its_published_roots() {
    let data: [&[u8]; 8] = [
        b"",
        b"\x00",
        b"\x10",
        b"\x20\x21",
        b"\x30\x31",
        b"\x40\x41\x42\x43",
        b"\x50\x51\x52\x53\x54\x55\x56\x57",
        b"\x60\x61\x62\x63\x64\x65\x66\x67\x68\x69\x6a\x6b\x6c\x6d\x6e\x6f",
    ];
    let roots = [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
        "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
        "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
        "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
        "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
        "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
    ];
    assert_eq!(
        Frontier::default().root(),
        hex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    );
    let leaves: Vec<Hash> = data.iter().map(|data| leaf(data)).collect();
    let mut frontier = Frontier::default();
    for (at, (leaf, want)) in leaves.iter().zip(roots).enumerate() {
        frontier.push(*leaf, |_, _| {});
        assert_eq!(frontier.root(), hex(want), "{}", at + 1);
    }
    let Ok(proof) = inclusion(&leaves[..], 0, 8);
    let want = [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ];
    assert_eq!(proof, want.map(hex));
    let Ok(proof) = consistency(&leaves[..], 6, 8);
    let want = [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ];
    assert_eq!(proof, want.map(hex));
}

#[test]
fn every_small_tree_is_as_the_definition_says() {
    let all = leaves(70);
    let mut frontier = Frontier::default();
    for size in 1..=all.len() {
        frontier.push(all[size - 1], |_, _| {});
        let (d, n) = (&all[..size], size as u64);
        let whole = mth(d);
        assert_eq!(root(&all[..], n), Ok(whole));
        assert_eq!(frontier.root(), whole);
        for at in 0..size {
            let Ok(proof) = inclusion(&all[..], at as u64, n);
            assert_eq!(proof, path(at, d));
            assert!(includes(&all[at], at as u64, n, &proof, &whole));
            assert!(!includes(&all[at], at as u64 + 1, n, &proof, &whole) || size == 1);
        }
        for old in 1..=size {
            let Ok(proof) = consistency(&all[..], old as u64, n);
            assert_eq!(proof, if old == size { Vec::new() } else { subproof(old, d, true) });
            let before = State { size: old as u64, root: mth(&all[..old]) };
            let after = State { size: n, root: whole };
            assert!(extends(&before, &after, &proof), "{old} {size}");
            let bent = State { root: [1; 32], ..before };
            assert!(!extends(&bent, &after, &proof));
            assert!(!extends(&before, &State { root: [1; 32], ..after }, &proof));
        }
    }
}

#[test]
fn files_say_what_memory_says() {
    let folder = tempfile::tempdir().unwrap();
    let all = leaves(70_000);
    let mut tree = TreeFiles::create(folder.path()).unwrap();
    all.iter().for_each(|leaf| tree.push(*leaf).unwrap());
    tree.sync().unwrap();
    assert_eq!(std::fs::metadata(level_path(folder.path(), 1)).unwrap().len(), 273 * 32);
    assert_eq!(std::fs::metadata(level_path(folder.path(), 2)).unwrap().len(), 32);
    let reader = TreeReader::new(folder.path());
    for size in [0, 1, 255, 256, 257, 65_535, 65_536, 65_537, 70_000] {
        let want = mth(&all[..usize::try_from(size).unwrap()]);
        assert_eq!(root(&reader, size).unwrap(), want, "{size}");
        assert_eq!(Frontier::of(&reader, size).unwrap().root(), want);
        for at in [0, size / 3, size.saturating_sub(1)] {
            let path = inclusion(&reader, at, size).unwrap();
            let leaf = &all[usize::try_from(at).unwrap()];
            assert_eq!(includes(leaf, at, size, &path, &want), size > 0);
        }
        let whole = State { size: 70_000, root: tree.frontier().root() };
        let path = consistency(&reader, size, 70_000).unwrap();
        assert!(extends(&State { size, root: want }, &whole, &path));
    }
    assert!(matches!(root(&reader, 70_001), Err(TreeError::Short { .. })));
}

#[test]
fn a_tree_is_gone_on_with_where_it_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let all = leaves(600);
    let mut tree = TreeFiles::create(folder.path()).unwrap();
    all[..500].iter().for_each(|leaf| tree.push(*leaf).unwrap());
    tree.flush().unwrap();
    // Half a hash at the end, as after a crash.
    let mut file = OpenOptions::new().append(true).open(level_path(folder.path(), 0)).unwrap();
    file.write_all(&[1; 17]).unwrap();
    let mut tree = TreeFiles::open(folder.path(), 300).unwrap();
    assert_eq!(tree.frontier().root(), mth(&all[..300]));
    all[300..].iter().for_each(|leaf| tree.push(*leaf).unwrap());
    tree.flush().unwrap();
    assert_eq!(root(&TreeReader::new(folder.path()), 600).unwrap(), mth(&all));
    assert!(matches!(TreeFiles::open(folder.path(), 601), Err(TreeError::Short { .. })));
}

proptest! {
    #[test]
    fn proofs_prove_that_alone(size in 1_u64..400, at in 0_u64..400, old in 0_u64..400, bit in 0_usize..256) {
        let all = leaves(size);
        let (at, old) = (at % size, old % (size + 1));
        let whole = State { size, root: mth(&all) };
        let leaf = all[usize::try_from(at).unwrap()];
        let Ok(path) = inclusion(&all[..], at, size);
        prop_assert!(includes(&leaf, at, size, &path, &whole.root));
        let flip = |hash: &Hash| { let mut bent = *hash; bent[bit / 8] ^= 1 << (bit % 8); bent };
        prop_assert!(!includes(&flip(&leaf), at, size, &path, &whole.root));
        for step in 0..path.len() {
            let mut bent = path.clone();
            bent[step] = flip(&bent[step]);
            prop_assert!(!includes(&leaf, at, size, &bent, &whole.root));
            prop_assert!(!includes(&leaf, at, size, &path[..step], &whole.root));
        }
        let before = State { size: old, root: mth(&all[..usize::try_from(old).unwrap()]) };
        let Ok(path) = consistency(&all[..], old, size);
        prop_assert!(extends(&before, &whole, &path));
        for step in 0..path.len() {
            let mut bent = path.clone();
            bent[step] = flip(&bent[step]);
            prop_assert!(!extends(&before, &whole, &bent));
        }
    }
}
