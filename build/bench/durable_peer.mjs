// npm's oidc-provider with rotated refresh tokens in SQLite, each write synced before the answer (synchronous = FULL).
// env: PORT, SECRET, KEY (a JWK file, made when missing), DB; run in the folder of its node_modules. GET /mint?n=50 makes
// refresh tokens as finished logins leave them, for the bench alone.
import { createRequire } from 'node:module';
import { generateKeyPairSync } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';
import { DatabaseSync } from 'node:sqlite';

const { PORT, SECRET, KEY, DB } = process.env;
if (!existsSync(KEY)) {
  const pair = generateKeyPairSync('ec', { namedCurve: 'P-256' });
  writeFileSync(KEY, JSON.stringify({ ...pair.privateKey.export({ format: 'jwk' }), use: 'sig', alg: 'ES256', kid: 'bench' }));
}
const db = new DatabaseSync(DB);
for (const setting of ['busy_timeout = 5000', 'journal_mode = WAL', 'synchronous = FULL']) db.exec(`PRAGMA ${setting}`);
db.exec(`CREATE TABLE IF NOT EXISTS stored (name TEXT, id TEXT, payload TEXT, exp INTEGER, grant_id TEXT, uid TEXT, PRIMARY KEY (name, id));
  CREATE INDEX IF NOT EXISTS stored_grant ON stored (grant_id); CREATE INDEX IF NOT EXISTS stored_uid ON stored (name, uid)`);
const put = db.prepare('INSERT INTO stored VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name, id) DO UPDATE SET payload = excluded.payload, exp = excluded.exp');
const get = db.prepare('SELECT payload, exp FROM stored WHERE name = ? AND id = ?');
const byUid = db.prepare('SELECT payload FROM stored WHERE name = ? AND uid = ?');
const remove = db.prepare('DELETE FROM stored WHERE name = ? AND id = ?');
const removeGrant = db.prepare('DELETE FROM stored WHERE grant_id = ?');
const now = () => Math.floor(Date.now() / 1000);
class Adapter {
  constructor(name) { this.name = name; }
  async upsert(id, payload, ttl) { put.run(this.name, id, JSON.stringify(payload), ttl ? now() + ttl : null, payload.grantId ?? null, payload.uid ?? null); }
  async find(id) { const row = get.get(this.name, id); return row && !(row.exp && row.exp < now()) ? JSON.parse(row.payload) : undefined; }
  async findByUid(uid) { const row = byUid.get(this.name, uid); return row && JSON.parse(row.payload); }
  async findByUserCode() {}
  async destroy(id) { remove.run(this.name, id); }
  async revokeByGrantId(grantId) { removeGrant.run(grantId); }
  async consume(id) { const payload = await this.find(id); if (payload) await this.upsert(id, { ...payload, consumed: now() }, payload.exp && payload.exp - now()); }
}
const require = createRequire(process.cwd() + '/x.js');
const { default: Provider } = await import(pathToFileURL(require.resolve('oidc-provider')));
const provider = new Provider(`http://127.0.0.1:${PORT}`, {
  adapter: Adapter, jwks: { keys: [JSON.parse(readFileSync(KEY))] }, scopes: ['openid', 'offline_access', 'bench'], cookies: { keys: ['bench'] },
  findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  clients: [{ client_id: 'bench', client_secret: SECRET, grant_types: ['authorization_code', 'refresh_token'], redirect_uris: ['http://127.0.0.1/cb'], response_types: ['code'], scope: 'openid offline_access bench', id_token_signed_response_alg: 'ES256' }],
  issueRefreshToken: () => true, rotateRefreshToken: true,
  features: {
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true, defaultResource: () => 'urn:bench', useGrantedResource: () => true,
      getResourceServerInfo: (ctx, resource) => ({ scope: 'bench', audience: resource, accessTokenTTL: 3600, accessTokenFormat: 'jwt', jwt: { sign: { alg: 'ES256' } } }),
    },
  },
});
provider.use(async (ctx, next) => {
  if (ctx.path !== '/mint') return next();
  const client = await provider.Client.find('bench'), minted = [];
  for (let count = 0; count < +ctx.query.n; count++) {
    const grant = new provider.Grant({ accountId: 'ann', clientId: 'bench' });
    grant.addOIDCScope('openid offline_access');
    grant.addResourceScope('urn:bench', 'bench');
    const grantId = await grant.save();
    minted.push(await new provider.RefreshToken({ accountId: 'ann', client, grantId, gty: 'authorization_code', scope: 'openid offline_access bench', resource: 'urn:bench', authTime: now(), expiresWithSession: false, rotations: 0, iiat: now() }).save());
  }
  ctx.body = minted.join('\n');
});
provider.listen(+PORT, '127.0.0.1');
