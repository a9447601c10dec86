// The peer: npm's oidc-provider, client_credentials with JWT access tokens (which it does not store) and
// opaque ones (kept in its memory, so that they can be introspected).
// env: PORT, ALG, WORKERS, SECRET, KEY (a JWK file, made when missing); run in the folder of its node_modules.
import { createRequire } from 'node:module';
import { generateKeyPairSync } from 'node:crypto';
import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { pathToFileURL } from 'node:url';
import cluster from 'node:cluster';

const { PORT, ALG, SECRET, KEY } = process.env;
if (!existsSync(KEY)) {
  const pair = ALG === 'RS256' ? generateKeyPairSync('rsa', { modulusLength: 2048 }) : generateKeyPairSync('ec', { namedCurve: 'P-256' });
  writeFileSync(KEY, JSON.stringify({ ...pair.privateKey.export({ format: 'jwk' }), use: 'sig', alg: ALG, kid: 'bench' }));
}
if (cluster.isPrimary && +process.env.WORKERS > 1) {
  for (let count = 0; count < +process.env.WORKERS; count++) cluster.fork();
  process.on('SIGTERM', () => process.exit(0));
} else {
  const require = createRequire(process.cwd() + '/x.js');
  const { default: Provider } = await import(pathToFileURL(require.resolve('oidc-provider')));
  const provider = new Provider(`http://127.0.0.1:${PORT}`, {
    jwks: { keys: [JSON.parse(readFileSync(KEY))] },
    scopes: ['openid', 'bench'],
    cookies: { keys: ['bench'] },
    clients: [{ client_id: 'bench', client_secret: SECRET, grant_types: ['client_credentials'], redirect_uris: [], response_types: [], scope: 'bench', id_token_signed_response_alg: ALG }],
    features: {
      clientCredentials: { enabled: true }, introspection: { enabled: true }, devInteractions: { enabled: false },
      resourceIndicators: {
        enabled: true, defaultResource: () => 'urn:bench', useGrantedResource: () => true,
        getResourceServerInfo: (ctx, resource) => ({ scope: 'bench', audience: resource, accessTokenTTL: 3600, accessTokenFormat: resource === 'urn:opaque' ? 'opaque' : 'jwt', jwt: { sign: { alg: ALG } } }),
      },
    },
  });
  provider.listen(+PORT, '127.0.0.1');
}
